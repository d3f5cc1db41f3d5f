"""The whole 38B chain, from parts to an export, on a tiny model: the commands of its scripts, one after the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_tools import megatron_to_hf
from megatron_r1v2.__main__ import main
from megatron_r1v2.checkpoint.manifest import Manifest
from megatron_r1v2.checkpoint.megatron.run_folder import finished_checkpoints
from megatron_r1v2.data.shards import check_shards
from tests.examples.small_chain import MODEL, commands, write_chain
from tests.stages.conftest import _one_process  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the adapter of a Hugging Face folder."""
    weights = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    return {name: value for name, value in weights.items() if "multi_modal_projector" in name}


def test_each_stage_goes_on_from_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_chain(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    *stages, (tool, *export) = commands(tmp_path)
    assert [command[0] for command in stages] == ["align", "pairs", "mpo", "grpo", "evaluate"]
    assert tool == "megatron_to_hf"
    assert Manifest(tmp_path / MODEL).random_parts == {"adapter"}
    for stage, *arguments in stages:
        if stage == "pairs":
            # Before align nothing may train on the random adapter.
            with pytest.raises(SystemExit):
                main(["grpo", "examples/r1v2_38b/grpo.yaml", "model.checkpoint="])
        assert main([stage, *arguments]) == 0, stage
    megatron_to_hf.main(export)

    runs = tmp_path / "runs"
    assert sum(check_shards(runs / "r1v2-38b-pairs").values()) >= 4
    saved = {}
    for stage in ("align", "mpo", "grpo"):
        checkpoint = finished_checkpoints(runs / f"r1v2-38b-{stage}" / "checkpoints")[-1]
        assert checkpoint.name == "step-00000002"
        saved[stage] = torch.load(checkpoint / "state.pt", weights_only=True)
        assert (runs / f"r1v2-38b-{stage}" / "report.html").is_file()
    # A stage starts from the adapter that the one before has left.
    for before, after in (("align", "mpo"), ("mpo", "grpo")):
        assert saved[after]["started_from"]["adapter"] == saved[before]["checksums"]["adapter"], after
        assert saved[after]["started_from"]["adapter"] != saved[after]["checksums"]["adapter"], after
    result = json.loads((runs / "r1v2-38b-grpo" / "evaluation-evaluation.json").read_text())
    assert result["num_prompts"] == 4
    before, after = adapter_of(tmp_path / MODEL), adapter_of(tmp_path / "checkpoints" / "r1v2-38b-trained")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
