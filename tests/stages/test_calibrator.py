"""Whole runs in which hallucination pays: it makes the policy lie, unless the calibrator holds it.

GRPO has a reward model that likes wrong claims. MPO has pairs of which most prefer a wrong claim by a small margin, and
some a true one by a large margin.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1v2.checkpoint.megatron.run_folder import finished_checkpoints
from megatron_r1v2.data.samples import ShardSample, parse_sample
from megatron_r1v2.data.shards import write_shards
from megatron_r1v2.data.stream import read_shards
from megatron_r1v2.stages import calibrator
from megatron_r1v2.stages.grpo.stage import run_grpo
from megatron_r1v2.types import Prompt
from tests.stages.runs import checkpoint_contents, differences, read_metrics, recipe_for, run_stage, without_timings

STEPS = 8
TARGET = 0.3
SETTINGS = (
    f"train.steps={STEPS}",
    "train.parts=[adapter, language]",
    "train.learning_rate=0.01",
    "generation.responses_per_prompt=8",
    "buffer.target_effective_fraction=0.8",
    "reward.answer_weight=0.2",
    "reward.format_weight=0",
    "reward.consistency_weight=0.5",
    "reward.model_weight=1.0",
    "reward_model.url=http://127.0.0.1:1",  # the runs are given a reward model
    "reward.model_centre=0",
    "reward.model_scale=1",
    "evaluation.runs=4",
    "evaluation.every_steps=1",
    f"hallucination.target_rate={TARGET}",
    "checkpoint.every_steps=4",
)


class Flatterer:
    """A reward model that likes what the pictures do not show: every fact says "left 3"."""

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Return 4 for a wrong claim, less 4 for a true one."""
        return [4.0 * ("left 4, " in text) - 4.0 * ("left 3, " in text) for text in texts]


@pytest.fixture(scope="module", autouse=True)
def few_claims_are_enough():
    """A random model makes few claims at first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrator, "MIN_COVERAGE", 0.1)
        yield


@pytest.fixture(scope="module")
def start(root: Path, few_claims_are_enough: None):
    """Return a function that does a run with the flatterer."""

    def run(output: Path, *overrides: str) -> Path:
        settings = (*SETTINGS, f"data.validation={root / 'data'}", *overrides)
        return run_grpo(recipe_for(root, output, settings), reward_model=Flatterer())

    return run


@pytest.fixture(scope="module")
def held(start, tmp_path_factory) -> Path:
    """Return a run with the calibrator."""
    return start(tmp_path_factory.mktemp("held") / "run")


def test_a_policy_that_is_paid_for_hallucinating_is_held(start, held: Path, tmp_path: Path) -> None:
    free = read_metrics(start(tmp_path / "free", "hallucination.target_rate=0", "evaluation.every_steps=1"))
    rates = [line["validation/hallucination_rate"] for line in free]
    assert min(rates[-4:]) > 0.95
    assert not any(name.startswith("hallucination/model_weight") for line in free for name in line)
    lines = read_metrics(held)
    # Both had the same first step; then the brake was on.
    assert lines[0]["validation/hallucination_rate"] == rates[0] > TARGET
    assert max(line["validation/hallucination_rate"] for line in lines[-4:]) < TARGET
    assert min(line["validation/claim_coverage"] for line in lines[-4:]) > 0.5  # not by falling silent
    assert lines[-1]["reward/model/mean"] < free[-1]["reward/model/mean"]


def test_every_decision_is_in_the_metrics(held: Path) -> None:
    lines = read_metrics(held)
    weights = [line["hallucination/model_weight"] for line in lines]
    decisions = [line["hallucination/decision"] for line in lines]
    assert weights[0] == 1.0
    assert decisions[0] == 1
    assert set(decisions) == {1, 0, -1}
    for before, after, decision in zip(weights, weights[1:], decisions, strict=False):
        expected = {1: 0.5 * before, 0: before, -1: before + 0.05}[decision]
        assert after == pytest.approx(expected)
    for line, weight in zip(lines, weights, strict=True):
        assert line["hallucination/brake"] == pytest.approx(1 - weight)
        parts = 0.2 * line["reward/answer/mean"] + weight * line["reward/model/mean"]
        assert line["critic/rewards/mean"] >= parts - 1e-6


def test_an_interrupted_run_goes_on_with_the_brake_where_it_was(start, held: Path, tmp_path: Path) -> None:
    shutil.copytree(held, tmp_path / "run")
    shutil.rmtree(finished_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    resumed = start(tmp_path / "run")
    assert without_timings(read_metrics(resumed)) == without_timings(read_metrics(held))
    ends = [checkpoint_contents(finished_checkpoints(run / "checkpoints")[-1]) for run in (held, resumed)]
    assert differences(*ends) == []
    assert ends[0]["state.pt"]["calibration"]["brake"] > 0


def test_what_was_rewarded_with_more_weight_is_not_replayed(held: Path) -> None:
    lines = read_metrics(held)
    assert any(line["ssb/replayed"] for line in lines), "else the buffer would be in no danger"
    for before, now in itertools.pairwise(lines):
        if now["hallucination/model_weight"] < before["hallucination/model_weight"]:
            assert now["ssb/replayed"] == 0


def test_a_validation_set_without_facts_cannot_be_held(root: Path, start, tmp_path: Path) -> None:
    write_shards((replace(sample, facts={}) for sample in read_shards(root / "data", parse_sample)), tmp_path / "blank")
    with pytest.raises(ValueError, match="none of the 16 prompts read from data.validation=.* has facts"):
        start(tmp_path / "run", f"data.validation={tmp_path / 'blank'}")


MPO_STEPS = 12
MPO = (
    f"train.steps={MPO_STEPS}",
    "train.parts=[adapter, language]",
    "train.learning_rate=0.01",
    "train.prompts_per_step=9",
    "evaluation.runs=4",
    "hallucination.max_margin=0.5",
    "checkpoint.every_steps=6",
)


@pytest.fixture(scope="module")
def pairs(root: Path, tmp_path_factory) -> Path:
    """Return pairs: for each picture two of a small margin that prefer a lie, one of a large margin that does not."""
    folder = tmp_path_factory.mktemp("pairs") / "shards"
    lie, truth = "left 4, </think>\\boxed{0}", "left 3, </think>\\boxed{0}"

    def made() -> Iterator[ShardSample]:
        for sample in read_shards(root / "data", parse_sample):
            if sample.images:
                yield replace(sample, key=f"{sample.key}-a", chosen=lie, rejected=truth, margin=0.1)
                yield replace(sample, key=f"{sample.key}-b", chosen=lie, rejected=truth, margin=0.1)
                yield replace(sample, key=f"{sample.key}-c", chosen=truth, rejected=lie, margin=0.9)

    write_shards(made(), folder)
    return folder


@pytest.mark.slow
def test_tau_holds_mpo_on_pairs_that_prefer_hallucination(root: Path, pairs: Path, tmp_path: Path) -> None:
    data = (f"data.train={pairs}", f"data.validation={root / 'data'}")

    def start(name: str, target: float) -> Path:
        overrides = (*MPO, *data, f"hallucination.target_rate={target}", "evaluation.every_steps=1")
        return run_stage(recipe_for(root, tmp_path / name, overrides, stage="mpo"))

    free, run = read_metrics(start("free", 0.0)), start("held", TARGET)
    held = read_metrics(run)
    assert min(line["validation/hallucination_rate"] for line in free[-4:]) > 0.6
    assert max(line["validation/hallucination_rate"] for line in held[-4:]) < TARGET
    assert min(line["validation/claim_coverage"] for line in held[-4:]) > 0.5
    for line in held:
        assert line["mpo/min_margin"] == line["hallucination/threshold"]
        assert line["mpo/pairs_below_margin"] > 0 or line["hallucination/threshold"] <= 0.1
    # Interrupted half-way, with tau raised, it ends with the same bits.
    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(finished_checkpoints(tmp_path / "again" / "checkpoints")[-1])
    start("again", TARGET)
    ends = [
        checkpoint_contents(finished_checkpoints(tmp_path / name / "checkpoints")[-1]) for name in ("held", "again")
    ]
    assert differences(*ends) == []
    assert without_timings(read_metrics(tmp_path / "again")) == without_timings(held)
