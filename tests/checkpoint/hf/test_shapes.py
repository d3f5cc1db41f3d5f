"""Shapes of parameters from transformers: what our own model has, and what a folder of other shapes is refused by."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools import hf_to_hf, hf_to_megatron, verify
from megatron_r1v2.checkpoint.hf.config import read_hf_config
from megatron_r1v2.checkpoint.hf.shapes import parameter_shapes
from megatron_r1v2.checkpoint.sources import CheckpointSpec, HfSpec
from tests.checkpoint.damage import run


def test_they_are_those_of_the_folder_in_either_layout(made):
    for name in ("hf", "chat"):
        shapes = parameter_shapes(read_hf_config(made / name)[0])
        with HfSpec(made / name).open() as source:
            assert {ours: source.parameter(ours).shape for ours in source.names()} == dict(shapes)


# One tensor of each kind: whole, split by rows, by columns, by heads, stacked, a bias, the vocabulary.
@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.embeddings.cls_token",
        "vision_tower.embeddings.position_embeddings",
        "vision_tower.encoder.layer.1.lambda_1",
        "vision_tower.encoder.layer.0.mlp.fc1.weight",
        "vision_tower.encoder.layer.0.attention.q_norm.weight",
        "multi_modal_projector.layer_norm.weight",
        "multi_modal_projector.linear_2.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.norm.weight",
        "language_model.model.layers.1.self_attn.o_proj.weight",
        "language_model.model.layers.1.self_attn.k_proj.bias",
        "language_model.model.layers.1.mlp.up_proj.weight",
    ],
)
def test_a_tensor_of_another_shape_is_named(made, tmp_path, capsys, name):
    folder = tmp_path / "model"
    shutil.copytree(made / "hf", folder)
    whole = load_file(folder / "model.safetensors")
    other = whole[name]
    for dim in range(other.dim()):
        changed = torch.cat([other, other.narrow(dim, 0, 1)], dim=dim)
        save_file({**whole, name: changed}, folder / "model.safetensors")
        for tool, arguments in ((verify, []), (hf_to_hf, ["--output", tmp_path / "out", "--quiet"])):
            source = [folder] if tool is verify else ["--hf", folder]
            run(tool, *source, *arguments, code=1)
            told = capsys.readouterr().err
            assert name in told, (dim, told)
            assert "do not belong to this config.json" in told
    run(hf_to_megatron, "--hf", folder, "--output", tmp_path / "out", "--quiet", code=1)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_other_shapes_is_refused_when_it_is_opened(made, folders):
    with pytest.raises(ValueError, match=r"is \[.*\] in the checkpoint, which is not the model of config.json|layers"):
        CheckpointSpec(made / "megatron", folders / "foreign").open()
