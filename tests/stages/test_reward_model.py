"""Whole reward_model runs: what they learn, save and refuse; and GRPO with the model they make."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_r1v2.checkpoint.megatron.run_folder import finished_checkpoints
from megatron_r1v2.config.recipes import GrpoRecipe, RewardModelRecipe
from megatron_r1v2.rewards.served_model import ScoringFailed
from tests.rewards.test_served_model import Server, shorten_pauses
from tests.stages.runs import (
    checkpoint_contents,
    differences,
    read_metrics,
    read_rollouts,
    recipe_for,
    run_stage,
    without_timings,
)

Run = Callable[..., Path]
PARTS = "train.parts=[adapter, score]"


def settings(root: Path, output: Path, *overrides: str) -> RewardModelRecipe:
    return recipe_for(root, output, ("checkpoint.every_steps=0", PARTS, *overrides), stage="reward_model")


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Run:
    def start(*overrides: str, name: str = "run") -> Path:
        return run_stage(settings(root, tmp_path / name, *overrides))

    return start


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    overrides = (
        "train.steps=25",
        "train.learning_rate=0.01",
        "evaluation.every_steps=25",
        "train.tokens_per_microbatch=512",
    )
    return run_stage(settings(root, output, f"data.validation={root / 'data'}", *overrides))


def end(run: Path) -> dict:
    return checkpoint_contents(finished_checkpoints(run / "checkpoints")[-1])


def test_it_learns_to_rank(trained: Path) -> None:
    lines = read_metrics(trained)
    assert len(lines) == 25
    assert lines[0]["data/text_only_left_out"] == 0, "the head sees text too"
    assert lines[0]["reward_model/loss"] == pytest.approx(lines[0]["actor/loss"], rel=1e-5)
    assert sum(line["reward_model/accuracy"] for line in lines[-5:]) / 5 > 0.9
    assert lines[-1]["validation/accuracy"] > 0.9
    assert lines[-1]["validation/margin"] > 1
    assert lines[-1]["reward_model/loss"] < math.log(2) / 2
    for line in lines:
        scores = line["reward_model/chosen_score"] - line["reward_model/rejected_score"]
        assert line["reward_model/margin"] == pytest.approx(scores, abs=1e-6)


def test_the_head_is_a_part_of_its_own_in_the_checkpoint(trained: Path) -> None:
    saved = end(trained)
    assert saved["state.pt"]["parts"] == saved["state.pt"]["trained"] == ["adapter", "score"]
    assert {name.split(".")[-3 if "optimizer" in name else 0] for name in saved["tensors"]} >= {"adapter", "score"}
    assert not any("output_layer" in name for name in saved["tensors"])


def test_a_resumed_stage_ends_with_the_same_bits(run: Run, root: Path, tmp_path: Path) -> None:
    overrides = ("train.steps=4", "checkpoint.every_steps=2", "reward_model.centring_weight=0.01")
    folder = run(*overrides)
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "step-00000004")
    run(*overrides, name="again")
    assert differences(end(again), end(folder)) == []
    assert without_timings(read_metrics(again)) == without_timings(read_metrics(folder))


def test_microbatches_and_packing_do_not_change_the_update(run: Run) -> None:
    name = "optimizer.state.exp_avg.score.weight"
    layouts = {
        "two rows": ("train.tokens_per_microbatch=1",),
        "shared": ("train.packing=shared", "train.tokens_per_microbatch=400"),
        "packed": ("train.packing=first_fit_decreasing", "train.tokens_per_microbatch=400"),
    }
    found = [end(run("train.steps=1", *layout, name=key))["tensors"][name] for key, layout in layouts.items()]
    scale = found[0].abs().max()
    assert scale > 0
    assert all((other - found[0]).abs().max() < 1e-4 * scale for other in found[1:])


def grpo_recipe(root: Path, output: Path, checkpoint: Path | str, *overrides: str) -> GrpoRecipe:
    scored = ("reward.model_weight=0.5", "reward.model_centre=0", "reward.model_scale=2")
    return recipe_for(root, output, (*scored, f"reward_model.checkpoint={checkpoint}", "train.steps=2", *overrides))


def test_grpo_counts_the_scores_of_a_checkpoint(root: Path, tmp_path: Path, trained: Path) -> None:
    folder = run_stage(grpo_recipe(root, tmp_path / "grpo", trained))
    for line in read_metrics(folder):
        assert 0 < line["reward/model/mean"] < 1
        assert math.isfinite(line["reward_model/score/mean"])
    rows = read_rollouts(folder)
    assert rows
    for row in rows:
        rewards = row["rewards"]
        assert rewards["model"] == pytest.approx(1 / (1 + math.exp(-row["model_score"] / 2)), abs=1e-6)
        total = rewards["answer"] + 0.2 * rewards["format"] + 0.5 * rewards["model"]
        assert row["total"] == pytest.approx(total, abs=1e-6)


def test_grpo_counts_the_scores_of_a_server_and_ends_when_it_is_gone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_pauses(monkeypatch)
    server = Server(tmp_path)
    scored = ("reward.model_weight=0.5", "reward.model_centre=0", "train.steps=1")
    folder = run_stage(recipe_for(root, tmp_path / "grpo", (*scored, f"reward_model.url={server.address}/ok")))
    told = server.told()
    assert told["asked"] == 6 * 4, "prompts x responses"
    assert "data:image/png;base64," in str(told["last"]["body"])
    for row in read_rollouts(folder):
        assert row["model_score"] == len(row["text"].split())
    server.process.kill()
    server.process.wait()
    gone = recipe_for(root, tmp_path / "gone", (*scored, f"reward_model.url={server.address}/ok"))
    with pytest.raises(ScoringFailed, match="gave no score for .* in 5 attempts"):
        run_stage(gone)


def test_a_policy_cannot_start_from_a_reward_model(root: Path, tmp_path: Path, trained: Path) -> None:
    recipe = recipe_for(root, tmp_path / "run", (f"model.checkpoint={trained}",), stage="align")
    with pytest.raises(ValueError, match=r"is of a reward model.*set reward_model.checkpoint"):
        run_stage(recipe)
