"""SIGTERM: the step is given up at once, what was generated is not generated again, nothing holds the process up."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from megatron_r1v2.checkpoint.megatron.run_folder import finished_checkpoints
from tests.stages.runs import Ranks, assert_same_end, read_metrics, recipe_for, run_stage

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


def test_a_replica_that_waits_for_another_publishes_and_stops_with_it(root: Path, tmp_path: Path) -> None:
    # One prompt: the replica that gets none waits while the other generates 48 responses, one after the other.
    alone = ("train.prompts_per_step=1", "generation.responses_per_prompt=48", "generation.max_requests=1")
    ranks = Ranks(recipe_for(root, tmp_path / "run", (*SETTINGS, *alone)), 2)
    saved, generated = tmp_path / "run" / "checkpoints", tmp_path / "run" / "unfinished" / "step-00000002"
    ranks.wait_until((saved / "step-00000002").is_dir, 240)
    # Written in the background, and published while the next step still generates.
    assert generated.is_dir()
    assert not list(generated.glob("*.pt"))
    asked = time.monotonic()
    os.killpg(ranks.processes[1].pid, signal.SIGTERM)  # one of them alone: that it is asked to stop, all must learn
    log = ranks.wait(seconds=240)
    assert time.monotonic() - asked < 20  # less than checkpoint.grace_seconds
    assert "step 3 is abandoned, as asked by SIGTERM" in log
    assert finished_checkpoints(saved)[-1].name == "step-00000002"
    assert not list(generated.glob("*.pt"))


@pytest.mark.slow
def test_a_step_is_kept_when_its_validation_is_abandoned(root: Path, tmp_path: Path) -> None:
    validation = ("evaluation.every_steps=2", "evaluation.prompts=1", "evaluation.runs=4000")
    recipe = recipe_for(root, tmp_path / "run", (*SETTINGS, *validation, f"data.validation={root / 'data'}"))
    ranks = Ranks(recipe, 2)
    ranks.wait_until((tmp_path / "run" / "checkpoints" / "step-00000001").is_dir, 240)
    ranks.wait_until(lambda: all("evaluate" in ranks.phase_of(rank) for rank in range(2)), 240)
    asked = time.monotonic()
    for process in ranks.processes:
        os.killpg(process.pid, signal.SIGTERM)
    log = ranks.wait(seconds=240)
    assert time.monotonic() - asked < 20
    assert "the validation after step 2 is abandoned, as asked by SIGTERM" in log
    assert finished_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000002"
    assert "validation/pass_at_1" not in read_metrics(tmp_path / "run")[1]


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
    log = ranks.log.read_text()
    assert "checkpoint.grace_seconds=3 ago" in log
    # The account of the ranks is there, although the main thread cannot give it.
    assert re.search(r"where the ranks were:\n  rank 0: step .*\n  rank 1: step ", log), log
    ranks.kill()


def test_a_warning_that_comes_too_late_is_said(root: Path, tmp_path: Path) -> None:
    recipe = recipe_for(root, tmp_path / "run", ("train.steps=1", "checkpoint.lead_seconds=0.001"))
    log = Ranks(recipe).wait(seconds=240)
    assert "warning: a step and a save have taken" in log
    assert "checkpoint.lead_seconds=0.001 before the end" in log
