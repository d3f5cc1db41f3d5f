"""Whole MPO runs of a few steps: what they learn, log, leave out and refuse."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_r1v2.checkpoint.megatron.run_folder import finished_checkpoints
from megatron_r1v2.config.recipes import MpoRecipe
from megatron_r1v2.models.r1v2 import R1V2Model
from tests.stages.runs import (
    checkpoint_contents,
    differences,
    read_metrics,
    recipe_for,
    run_stage,
    without_timings,
)

Run = Callable[..., Path]
DPO = ("preference.preference_weight=1", "preference.quality_weight=0", "preference.generation_weight=0")
SFT = ("preference.preference_weight=0", "preference.quality_weight=0", "preference.generation_weight=1")


def settings(root: Path, output: Path, *overrides: str, stage: str = "mpo") -> MpoRecipe:
    return recipe_for(root, output, ("checkpoint.every_steps=0", *overrides), stage=stage)


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Run:
    def start(*overrides: str, name: str = "run") -> Path:
        return run_stage(settings(root, tmp_path / name, *overrides))

    return start


def end(run: Path) -> dict:
    return checkpoint_contents(finished_checkpoints(run / "checkpoints")[-1])


def test_chosen_answers_get_more_probable_and_margins_rise(run: Run) -> None:
    folder = run(
        "train.steps=12", "train.learning_rate=0.005", "train.warmup_steps=2", "train.parts=[adapter, language]"
    )
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 13))
    first, last = lines[0], lines[-1]
    # The policy is its own reference: 0.8 log 2 + 0.2 x 2 log 2 beside the likelihood of the chosen responses.
    assert first["actor/loss"] == pytest.approx(1.2 * math.log(2) + first["mpo/generation_loss"], abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert first["mpo/delta"] == 0.0
    for line in lines:
        parts = 0.8 * line["mpo/preference_loss"] + 0.2 * line["mpo/quality_loss"] + line["mpo/generation_loss"]
        assert line["actor/loss"] == pytest.approx(parts, rel=1e-5)
        assert (line["mpo/pairs_kept"], line["mpo/pairs_below_margin"], line["data/text_only_left_out"]) == (6, 0, 0)
        assert {"actor/grad_norm", "actor/lr", "timing_s/update", "timing_s/step"} <= line.keys()
    assert last["rewards/margins"] > 0.1
    assert last["rewards/accuracies"] > 0.8
    assert last["logps/chosen"] > first["logps/chosen"] + 1
    assert last["mpo/preference_loss"] < math.log(2)
    assert "timing_s/reference" in first
    saved = end(folder)
    assert saved["state.pt"]["parts"] == ["adapter", "language"]
    assert saved["state.pt"]["delta"]["count"] == 2 * sum(line["mpo/pairs_kept"] for line in lines)


def test_dpo_and_supervised_training_are_settings(run: Run, tmp_path: Path) -> None:
    dpo = read_metrics(run("train.steps=8", "train.learning_rate=0.005", *DPO, name="dpo"))
    assert dpo[0]["actor/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert dpo[-1]["rewards/margins"] > 0.05
    supervised = read_metrics(run("train.steps=8", "train.learning_rate=0.005", *SFT, name="sft"))
    assert supervised[0]["actor/loss"] == pytest.approx(supervised[0]["mpo/generation_loss"], rel=1e-6)
    assert supervised[-1]["actor/nll"] < supervised[0]["actor/nll"] - 0.3
    assert not any(name.startswith("rewards/") for name in supervised[0])
    assert not (tmp_path / "sft" / "reference").exists(), "no reference is needed"


def test_supervised_training_on_pairs_is_the_align_stage(run: Run, root: Path, tmp_path: Path) -> None:
    """The data has each chosen response as reference response too."""
    steps = ("train.steps=2", "train.tokens_per_microbatch=256")
    ours = end(run(*steps, *SFT, "loss.aggregation=token"))
    theirs = end(run_stage(settings(root, tmp_path / "align", *steps, stage="align")))
    assert differences(ours["tensors"], theirs["tensors"]) == []


def test_a_resumed_stage_ends_with_the_same_bits(run: Run, root: Path, tmp_path: Path) -> None:
    overrides = ("train.steps=4", "checkpoint.every_steps=2", "train.warmup_steps=1")
    folder = run(*overrides)
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "step-00000004")
    run(*overrides, name="again")
    assert end(folder)["state.pt"]["delta"]["value"] != 0
    assert differences(end(again), end(folder)) == []

    def lines(run: Path) -> list[dict]:
        return without_timings(read_metrics(run))

    assert lines(again) == lines(folder)


def test_microbatches_do_not_change_the_update_nor_delta(run: Run) -> None:
    overrides = ("train.steps=3", "train.learning_rate=0.005")
    one = run(*overrides, "train.tokens_per_microbatch=1", name="one")
    six = run(*overrides, "train.tokens_per_microbatch=512", name="six")
    packed = run(*overrides, "train.packing=first_fit_decreasing", "train.tokens_per_microbatch=256", name="packed")
    shared = run(*overrides, "train.packing=shared", "train.tokens_per_microbatch=256", name="shared")
    for ours, theirs in zip(read_metrics(shared), read_metrics(packed), strict=True):
        assert ours["perf/update_tokens"] < theirs["perf/update_tokens"] == theirs["perf/update_tokens_separate"]
        assert ours["perf/update_tokens_separate"] == theirs["perf/update_tokens_separate"]
    reference = end(one)
    name = "optimizer.state.exp_avg.adapter.linear_fc1.weight"
    assert reference["tensors"][name].abs().max() > 0
    for other in (six, packed, shared):
        found = end(other)
        torch.testing.assert_close(found["tensors"][name], reference["tensors"][name], rtol=1e-3, atol=1e-7)
        assert found["state.pt"]["delta"] == pytest.approx(reference["state.pt"]["delta"], rel=1e-4)


def test_delta_is_that_of_the_steps_before(run: Run) -> None:
    lines = read_metrics(run("train.steps=4", "train.learning_rate=0.005"))
    total = count = 0.0
    for line in lines:
        assert line["mpo/delta"] == pytest.approx(total / count if count else 0.0, rel=1e-9)
        pairs = line["mpo/pairs_kept"]
        total += pairs * (line["rewards/chosen"] + line["rewards/rejected"])
        count += 2 * pairs
    assert lines[-1]["mpo/delta"] != 0


def test_delta_is_in_the_unit_of_a_beta_that_changes(run: Run) -> None:
    first = end(run("train.steps=2", "preference.beta=0.1"))["state.pt"]["delta"]["value"]
    assert first != 0
    lines = read_metrics(run("train.steps=3", "preference.beta=0.3", "checkpoint.accept_changes=true"))
    assert lines[2]["mpo/delta"] == pytest.approx(3 * first, rel=1e-9)


def test_pairs_below_the_margin_are_left_out(run: Run) -> None:
    """Margins of the 12 pairs with images are 0 to 1.1; one step reads all 16."""
    line = read_metrics(run("train.steps=1", "train.prompts_per_step=16", "preference.min_margin=0.85"))[0]
    assert (line["mpo/pairs_kept"], line["mpo/pairs_below_margin"], line["data/text_only_left_out"]) == (3, 9, 4)
    assert line["mpo/min_margin"] == 0.85


def test_a_threshold_that_nothing_passes_ends_the_run(run: Run) -> None:
    with pytest.raises(ValueError, match=r"preference.min_margin=9 but the largest margin in data.train=.* is 1.5"):
        run("train.steps=30", "preference.min_margin=9")


@pytest.mark.parametrize("part", ["adapter", "vision"])
def test_the_two_responses_of_a_pair_share_the_image_features(run: Run, monkeypatch, part: str) -> None:
    """Half of the 12 pictures have one tile, half have two and a thumbnail."""
    tiles: list[int] = []
    encode = R1V2Model.encode_tiles

    def counting(model: R1V2Model, tiles_TCHW: torch.Tensor) -> torch.Tensor:
        tiles.append(tiles_TCHW.shape[0])
        return encode(model, tiles_TCHW)

    monkeypatch.setattr(R1V2Model, "encode_tiles", counting)
    run("train.steps=1", "train.prompts_per_step=16", f"train.parts=[{part}]")
    assert sum(tiles) == 2 * (6 * 1 + 6 * 3), "once for the reference, once for the step"
