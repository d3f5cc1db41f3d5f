"""Shapes of parameters from transformers: what our own model has, and what a folder of other shapes is refused by."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration

from checkpoint_tools import hf_to_hf, hf_to_megatron, verify
from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.checkpoint.hf.mapping import parameter_map, stored_names
from megatron_r1v2.checkpoint.hf.shapes import parameter_shapes
from megatron_r1v2.checkpoint.sources import CheckpointSpec, HfSpec
from megatron_r1v2.planning.known_models import KNOWN_MODELS
from tests.checkpoint.damage import run


def transformers_shapes(config: Mapping[str, object]) -> dict[str, torch.Size]:
    """The same from transformers' own classes."""
    with torch.device("meta"):
        tensors = InternVLForConditionalGeneration(InternVLConfig.from_dict(dict(config))).state_dict()
    # The pixel shuffle changes no shape; transformers has the second alone.
    architecture = replace(r1v2_architecture(config), pixel_shuffle="v2")
    stored = stored_names(tensors, "transformers", tied=architecture.language.tied_embeddings)
    by_table = {name: tensors[inside] for name, inside in stored.items()}
    rows = parameter_map(architecture)
    return {row.ours: row.to_shard(by_table, tensor_rank=0, tensor_size=1).shape for row in rows}


def test_they_are_those_of_the_folder_in_either_layout(made):
    for name in ("hf", "chat"):
        with HfSpec(made / name).open() as source:
            shapes = parameter_shapes(source.architecture)
            assert {ours: source.parameter(ours).shape for ours in source.names()} == dict(shapes)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tower", [{"norm_type": "rms_norm", "use_qk_norm": True}, {"attention_bias": True}])
@pytest.mark.parametrize("tied", [False, True])
def test_they_are_those_of_transformers(family, tower, tied):
    vision = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 80, "num_hidden_layers": 2, **tower}
    text = {"model_type": family, "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"head_dim": 12, "intermediate_size": 56, "num_hidden_layers": 3, "vocab_size": 70}
    config = {"model_type": "internvl", "image_token_id": 5, "tie_word_embeddings": tied}
    config |= {"vision_config": vision, "text_config": text}
    assert parameter_shapes(r1v2_architecture(config)) == transformers_shapes(config)


@pytest.mark.parametrize("name", sorted(KNOWN_MODELS))
def test_they_are_those_of_transformers_at_full_size(name):
    assert parameter_shapes(r1v2_architecture(KNOWN_MODELS[name])) == transformers_shapes(KNOWN_MODELS[name])


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
