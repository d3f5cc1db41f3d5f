"""The whole demo, what it promises, the same model in plain transformers, and a control with the wrong rewards."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1v2.evaluation.pass_at_1 import EvaluationResult, read_evaluation
from tests.examples.commands import run_script

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def run(*command: str) -> str:
    return subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True, text=True).stdout


def evaluations(folder: Path) -> tuple[EvaluationResult, EvaluationResult]:
    aligned, grpo = (read_evaluation(folder / f"evaluation-{name}.json") for name in ("aligned", "grpo"))
    return aligned, grpo


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return run_script(tmp_path_factory.mktemp("demo"), "examples/digits/run.sh")


def test_pass_at_1_rises_on_handwriting_never_trained_on(demo):
    before, after = evaluations(demo / "grpo")
    assert 0.35 <= before.pass_at_1 <= 0.60
    assert after.pass_at_1 >= 0.85
    assert after.claim_coverage >= 0.95
    assert after.hallucination_rate < before.hallucination_rate


def test_the_buffer_keeps_the_batches_effective(demo):
    steps = [json.loads(line) for line in (demo / "grpo" / "metrics.jsonl").read_text().splitlines()]
    last_third = steps[-len(steps) // 3 :]
    assert min(step["ssb/trained_effective_fraction"] for step in last_third) >= 0.6
    assert statistics.fmean(step["ssb/fresh_effective_fraction"] for step in last_third) < 0.4


def test_it_ends_with_a_picture_and_a_page(demo):
    assert (demo / "demo.svg").read_text().startswith("<?xml")
    assert (demo / "grpo" / "report.html").is_file()


def test_plain_transformers_computes_the_same(demo):
    out = run("examples.verify_export", "--run", str(demo / "grpo"), "--export", str(demo / "export"))
    assert "greedy responses equal: 100 of 100" in out


def test_the_endpoint_answers_as_the_model_in_process(demo):
    out = run("examples.digits.verify_endpoint", "--run", str(demo / "grpo"))
    assert "through the endpoint: " in out
    assert out.count("responses equal: 300, verdicts equal: 300") >= 2  # three with lm-eval


def test_shuffled_rewards_teach_nothing(demo, tmp_path):
    """The control: rewards of the right size and spread, dealt to the wrong responses."""
    settings = [
        f"run.output_dir={tmp_path}",
        f"model.hf_path={demo / 'base'}",
        f"data.train={demo / 'shards' / 'grpo'}",
    ]
    heldout = f"evaluation.data={demo / 'shards' / 'heldout'}"
    recipe = "examples/digits/grpo.yaml"
    before = read_evaluation(demo / "grpo" / "evaluation-mpo.json")
    run("megatron_r1v2", "grpo", recipe, *settings, f"model.checkpoint={demo / 'mpo'}", "reward.shuffle=true")
    run("megatron_r1v2", "evaluate", recipe, *settings, heldout, "--name", "shuffled", f"model.checkpoint={tmp_path}")
    after = read_evaluation(tmp_path / "evaluation-shuffled.json")
    assert abs(after.pass_at_1 - before.pass_at_1) <= 0.05
