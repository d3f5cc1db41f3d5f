"""SIGTERM: the step is given up at once, what was generated is not generated again, nothing holds the process up."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from megatron_r1v2.training.checkpoint import finished_checkpoints
from tests.training.runs import Ranks, assert_same_end, recipe_for, run_stage

STEPS, PROMPTS = 4, 8
# A prompt at a time: some are done while others have not begun, also where the test hears of the first one late.
SETTINGS = (
    f"train.steps={STEPS}",
    f"train.prompts_per_step={PROMPTS}",
    "generation.max_response_tokens=48",
    "generation.max_requests=4",
    "buffer.target_effective_fraction=0.95",
    "checkpoint.asynchronous=true",
)


def test_sigterm_gives_a_step_up_and_its_finished_rollouts_are_used(root: Path, tmp_path: Path) -> None:
    reference = run_stage(recipe_for(root, tmp_path / "reference", SETTINGS))
    recipe = recipe_for(root, tmp_path / "run", SETTINGS)
    unfinished = tmp_path / "run" / "unfinished"
    ranks = Ranks(recipe)

    def some_prompts_of_the_third_step_are_done() -> bool:
        return any((unfinished / "step-00000002").glob("*.pt"))

    ranks.wait_until(some_prompts_of_the_third_step_are_done, 240)
    for process in ranks.processes:  # every process of the step, as SLURM does: checkpoint writer and verifiers too
        os.killpg(process.pid, signal.SIGTERM)
    log = ranks.wait(seconds=240)
    assert "step 3 is abandoned, as asked by SIGTERM; finished rollouts are kept" in log
    # The checkpoint of the step before was being written in the background: it is whole.
    newest = finished_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert newest.name == "step-00000002"
    kept = len(list((unfinished / newest.name).glob("*.pt")))
    assert 0 < kept < PROMPTS
    again = Ranks(recipe).wait(seconds=240)
    assert f"resuming from {newest}" in again
    assert f"step 3: rollouts of {kept} of {PROMPTS} prompts are there from before" in again
    assert_same_end(tmp_path / "run", reference, rounded=True)


@pytest.mark.slow
def test_a_rank_that_is_stuck_ends_within_the_grace_time(root: Path, tmp_path: Path) -> None:
    recipe = recipe_for(root, tmp_path / "run", (*SETTINGS, "checkpoint.grace_seconds=3"))
    ranks = Ranks(recipe, 2)
    ranks.wait_until((tmp_path / "run" / "checkpoints" / "step-00000001").is_dir, 240)
    stuck, other = ranks.processes
    os.kill(other.pid, signal.SIGSTOP)  # now the first one waits for it for ever
    time.sleep(2)
    os.kill(stuck.pid, signal.SIGTERM)
    stuck.join(timeout=60)
    assert stuck.exitcode == 128 + signal.SIGTERM
    assert "checkpoint.grace_seconds=3 ago" in ranks.log.read_text()
    ranks.kill()


def test_a_warning_that_comes_too_late_is_said(root: Path, tmp_path: Path) -> None:
    recipe = recipe_for(root, tmp_path / "run", ("train.steps=1", "checkpoint.lead_seconds=0.001"))
    log = Ranks(recipe).wait(seconds=240)
    assert "warning: a step and a save have taken" in log
    assert "checkpoint.lead_seconds=0.001 before the end" in log
