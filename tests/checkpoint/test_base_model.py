"""A base is the model that a run was trained on, by what training noted of it, or it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools import hf_to_hf, megatron_to_hf, parts
from megatron_r1v2.checkpoint.base_model import check_base
from megatron_r1v2.checkpoint.hf.folders import read_json
from megatron_r1v2.checkpoint.megatron.run_folder import load_state, resolve_checkpoint
from megatron_r1v2.resilience.files import write_json
from tests.ranks import run_ranks
from tests.stages.runs import recipe_for, run_stage
from tests.stages.tiny_run import tiny_recipe

ONE_STEP = ("train.steps=1", "checkpoint.every_steps=0")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The folder of `tiny_recipe`, with model and data in it."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, root) -> tuple[Path, Path]:
    """A run that trained the adapter, and the model that it started from."""
    run = run_stage(recipe_for(root, tmp_path_factory.mktemp("trained") / "run", ONE_STEP, stage="align"))
    return run, Path(recipe_for(root, run.parent / "again").model.hf_path)


def refused(tool, *arguments: object) -> bool:
    try:
        tool.main([*map(str, arguments), "--quiet"])
    except SystemExit as stopped:
        return stopped.code == 1
    return False


def spoil_weight(name: str):
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1).view(torch.int32)[3] ^= 1 << 20
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def spoil_rope(folder: Path) -> None:
    config = read_json(folder / "config.json")
    text = config["text_config"]
    text["rope_theta"] = 123.0
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 123.0}
    write_json(folder / "config.json", config)


def spoil_epsilon(folder: Path) -> None:
    config = read_json(folder / "config.json")
    config["text_config"]["rms_norm_eps"] = 1e-3
    write_json(folder / "config.json", config)


SPOILT = {
    "language": spoil_weight("language_model.model.layers.1.self_attn.k_proj.weight"),
    "vision": spoil_weight("vision_tower.encoder.layer.0.mlp.fc1.weight"),
    "architecture rope": spoil_rope,
    "architecture eps": spoil_epsilon,
}


@pytest.mark.parametrize("spoilt", sorted(SPOILT))
def test_another_base_than_the_one_trained_on_is_refused(trained, tmp_path, capsys, spoilt):
    run, base = trained
    shutil.copytree(base, tmp_path / "other")
    SPOILT[spoilt](tmp_path / "other")
    source = ["--checkpoint", run, "--base", tmp_path / "other", "--output", tmp_path / "out"]
    for tool, command in ((megatron_to_hf, []), (parts, ["export"])):
        assert refused(tool, *command, *source)
        told = capsys.readouterr().err
        assert f"{tmp_path / 'other'} is not the model that" in told
        assert spoilt.split()[0] in told
        assert not (tmp_path / "out").exists()
    assert not refused(parts, "export", "--checkpoint", run, "--output", tmp_path / "adapter")
    applied = ["--parts", tmp_path / "adapter", "--base", tmp_path / "other", "--output", tmp_path / "out"]
    assert refused(parts, "apply", *applied)
    assert "is not the model that" in capsys.readouterr().err


def test_the_base_is_known_in_the_other_layout_and_elsewhere(trained, tmp_path, capsys):
    run, base = trained
    assert not refused(hf_to_hf, "--hf", base, "--layout", "chat", "--output", tmp_path / "chat")
    shutil.copytree(base, tmp_path / "moved")
    for number, same in enumerate((base, tmp_path / "chat", tmp_path / "moved")):
        out = tmp_path / str(number)
        assert not refused(megatron_to_hf, "--checkpoint", run, "--base", same, "--output", out)
        assert not refused(parts, "export", "--checkpoint", run, "--base", same, "--output", tmp_path / f"p{number}")
    assert capsys.readouterr().err == ""
    assert len({json.loads((tmp_path / f"p{n}" / "parts.json").read_text())["base_sha256"] for n in range(3)}) == 1


def train_in_two(root: str, output: str, layout: str) -> str:
    return str(run_stage(recipe_for(Path(root), Path(output), (*ONE_STEP, *layout.split()), stage="align")))


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2"])
def test_what_two_ranks_note_of_the_base_is_what_the_tools_compute(root, trained, tmp_path, layout):
    run = Path(run_ranks(2, train_in_two, str(root), str(tmp_path / "run"), f"{layout} model.precision=bf16")[0])
    checkpoint = resolve_checkpoint(run)
    state = load_state(checkpoint)
    assert sorted(state["base"]["checksums"]) == ["language", "vision"]
    assert state["base"]["dtype"] == "bfloat16"
    check_base(trained[1], checkpoint, state, workers=1)
    state["base"]["checksums"]["vision"] ^= 1
    with pytest.raises(ValueError, match="vision weights in bfloat16"):
        check_base(trained[1], checkpoint, state, workers=1)
