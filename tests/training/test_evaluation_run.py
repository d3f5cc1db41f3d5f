"""The evaluate command: the weights it takes, and the same numbers whenever it is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1v2.training.evaluation_run import run_evaluation
from tests.training.runs import recipe_for, run_stage


def test_an_evaluation_is_written_and_comes_out_the_same_again(root: Path, tmp_path: Path, capsys) -> None:
    recipe = recipe_for(root, tmp_path / "run", (f"evaluation.data={root / 'data'}", "evaluation.prompts=6"))
    first = run_evaluation(recipe, "before")
    assert "before" in capsys.readouterr().out
    written = json.loads((tmp_path / "run" / "evaluation-before.json").read_text())
    assert written["pass_at_1"] == first.pass_at_1
    assert (written["num_prompts"], len(written["runs"]), written["step"]) == (6, 2, 0)
    lines = (tmp_path / "run" / "evaluation-before.rollouts.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert sum(record["correct"] for record in records) / len(records) == pytest.approx(first.pass_at_1)
    second = run_evaluation(recipe, "again")
    assert (second.runs, second.mean_response_tokens) == (first.runs, first.mean_response_tokens)
    assert (tmp_path / "run" / "evaluation-again.rollouts.jsonl").read_text().splitlines() == lines


def test_a_checkpoint_is_evaluated_at_its_step(root: Path, tmp_path: Path) -> None:
    overrides = ("train.steps=12", "train.learning_rate=0.01", "checkpoint.every_steps=0", "train.parts=[language]")
    align = run_stage(recipe_for(root, tmp_path / "align", overrides), "align")
    data = f"evaluation.data={root / 'data'}"
    before = run_evaluation(recipe_for(root, tmp_path / "run", (data,)), "before")
    after = run_evaluation(recipe_for(root, tmp_path / "run", (data, f"model.checkpoint={align}")), "after")
    assert after.step == 12
    assert after.pass_at_1 > before.pass_at_1
    assert after.format_rate > 0.5
