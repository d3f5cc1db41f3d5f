"""The example of a reward of one's own: its function by hand, its recipe on a tiny model, and the demo's model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from examples.custom_reward.reward import nearness
from examples.digits import ablations
from examples.stages import StageRunner
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.config.recipes import GrpoRecipe
from megatron_r1v2.evaluation.pass_at_1 import read_evaluation
from megatron_r1v2.rewards.functions import check_functions
from megatron_r1v2.stages.grpo import stage
from tests.stages.runs import read_metrics, read_rollouts, recipe_for, run_stage
from tests.stages.tiny_run import tiny_recipe

FOLDER = Path("examples/custom_reward")
SEED = 1234


@pytest.mark.parametrize(
    ("response", "near", "shown"),
    [
        (r"left 3, right 5, 3+5=8</think>\boxed{8}", 1, 1),
        (r"left 3, right 5, 3+5=9</think>\boxed{9}", 0.8, 1),
        (r"left 3, right 5, 3+5=8</think>\boxed{9}", 0.8, 0),
        (r"</think>\boxed{-8}", 0, 0),
        ("left 3, right 5", 0, 0),
    ],
)
def test_the_function_by_hand(response, near, shown):
    assert nearness(response, "8", prompt="", metadata={}, images=[]) == {"near": pytest.approx(near), "shown": shown}


def test_the_file_is_as_short_as_it_is_said_to_be():
    assert len((FOLDER / "reward.py").read_text().splitlines()) <= 15


def test_the_recipe_trains_by_the_function_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "ROLLOUTS_KEPT", 24)
    recipe = load_recipe(FOLDER / "grpo.yaml")
    assert isinstance(recipe, GrpoRecipe)
    assert {name for name, weight in recipe.reward.weights.items() if weight} == {"nearness"}
    check_functions(recipe.reward.functions)
    tiny_recipe(tmp_path)  # writes the model and its data
    small = recipe_for(tmp_path, tmp_path / "run", ("train.steps=2",))
    run = run_stage(small.changed(reward=recipe.reward, buffer=recipe.buffer))
    for line in read_metrics(run):
        parts = line["reward/nearness/near/mean"], line["reward/nearness/shown/mean"]
        assert line["critic/rewards/mean"] == line["reward/nearness/mean"] == pytest.approx(sum(parts) / 2)
    assert any(rollout["rewards"]["nearness/near"] > 0 for rollout in read_rollouts(run))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_it_trains_the_model_of_the_demo(tmp_path: Path) -> None:
    root = tmp_path / "digits"
    runner = StageRunner(root, threads=os.cpu_count() or 1, console=Console())
    for step in [*ablations.shared_steps(root), *ablations.start_chain(root, SEED)[:1]]:
        runner.run(step)
    base, align, shards = root / "base", ablations.seed_folder(root, SEED) / ablations.START, root / "shards"
    output = tmp_path / "custom_reward"
    settings = [
        f"model.hf_path={base}",
        f"data.train={shards / 'grpo'}",
        f"run.output_dir={output}",
    ]
    heldout = f"evaluation.data={shards / 'heldout'}"
    for name, checkpoint in (("before", align), ("after", output)):
        recipe, start = str(FOLDER / "grpo.yaml"), f"model.checkpoint={align}"
        if name == "after":
            run("grpo", recipe, *settings, start)
        run("evaluate", recipe, *settings, heldout, "--name", name, f"model.checkpoint={checkpoint}")
    before, after = (read_evaluation(output / f"evaluation-{name}.json") for name in ("before", "after"))
    # The intervals are of about 5 points to each side.
    assert after.pass_at_1 >= before.pass_at_1 + 0.1


def run(*command: str) -> None:
    subprocess.run([sys.executable, "-m", "megatron_r1v2", *command], check=True)
