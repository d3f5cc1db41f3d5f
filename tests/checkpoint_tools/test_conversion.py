"""The two converters, through torch_dist checkpoints made and read at different layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_tools import hf_to_megatron, megatron_to_hf
from checkpoint_tools.layout import built_model
from megatron_r1v2.config.schema import Part
from megatron_r1v2.training.checkpoint import save_weights
from tests.models.test_hf_mapping import VARIANTS
from tests.ranks import run_ranks
from tests.tiny_hf import tiny_hf_model


def to_megatron(hf: str, megatron: str, tensor: int, pipeline: int) -> None:
    layout = ["--tensor", str(tensor), "--pipeline", str(pipeline)]
    hf_to_megatron.main(["--hf", hf, "--output", megatron, *layout])


def to_hf(megatron: str, base: str, output: str, tensor: int, pipeline: int) -> None:
    layout = ["--tensor", str(tensor), "--pipeline", str(pipeline)]
    megatron_to_hf.main(["--checkpoint", megatron, "--base", base, "--output", output, *layout])


@pytest.mark.parametrize(
    ("variant", "there", "back"),
    [
        pytest.param("6b-odd", (2, 1), (1, 1), marks=pytest.mark.slow),
        pytest.param("300m-odd", (1, 1), (2, 1), marks=pytest.mark.slow),
        pytest.param("300m-tied", (1, 2), (1, 1), marks=pytest.mark.slow),
        pytest.param("300m-tied", (1, 1), (1, 2), marks=pytest.mark.slow),
    ],
)
def test_round_trip_through_torch_dist_at_another_layout_is_bit_exact(tmp_path, variant, there, back):
    hf, megatron, output = (str(tmp_path / name) for name in ("hf", "megatron", "back"))
    tiny_hf_model(hf, **VARIANTS[variant])
    original = load_file(f"{hf}/model.safetensors")
    run_ranks(there[0] * there[1], to_megatron, hf, megatron, *there)
    # The base lends what is not in the checkpoint: with other weights in it, only the checkpoint's can come out.
    tiny_hf_model(hf, **VARIANTS[variant], seed=99)
    run_ranks(back[0] * back[1], to_hf, megatron, hf, output, *back)
    again = load_file(f"{output}/model.safetensors")
    assert again.keys() == original.keys()
    assert [key for key in again if not torch.equal(again[key], original[key])] == []


def save_changed_adapter(hf: str, checkpoint: str, output: str) -> None:
    """Save an adapter of sevens as an adapter-only run would, then export it, and check two refusals."""
    with built_model(Path(hf), tensor=1, pipeline=1) as (model, context):
        assert model.adapter is not None
        for parameter in model.adapter.parameters():
            parameter.data.fill_(7)
        save_weights(model, Path(checkpoint), context, parts=[Part.adapter])
    megatron_to_hf.main(["--checkpoint", checkpoint, "--base", hf, "--output", output])
    for arguments in (
        ["--checkpoint", checkpoint, "--base", hf, "--output", output],
        ["--checkpoint", f"{checkpoint}/nothing", "--base", hf, "--output", f"{output}2"],
    ):
        with pytest.raises(SystemExit) as stopped:
            megatron_to_hf.main(arguments)
        assert stopped.value.code == 1


def test_parts_that_were_not_trained_come_from_the_base(tmp_path):
    tiny_hf_model(tmp_path / "hf")
    original = load_file(tmp_path / "hf" / "model.safetensors")
    run_ranks(1, save_changed_adapter, str(tmp_path / "hf"), str(tmp_path / "checkpoint"), str(tmp_path / "out"))
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in exported.items():
        expected = torch.full_like(value, 7) if name.startswith("multi_modal_projector") else original[name]
        assert torch.equal(value, expected), name
    assert not (tmp_path / "out2").exists()
