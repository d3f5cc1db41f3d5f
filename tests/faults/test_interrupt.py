"""Ctrl-C: the first one finishes the step and saves, the second gives it up; also where torchrun hears it too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_r1v2.checkpoint.megatron.run_folder import finished_checkpoints
from tests.stages.runs import Ranks, has_line, recipe_for

# Nothing is saved before Ctrl-C; a prompt at a time, so that a step can be given up while it generates.
SETTINGS = (
    "train.steps=50",
    "train.prompts_per_step=8",
    "generation.max_response_tokens=48",
    "generation.max_requests=4",
    "checkpoint.every_steps=0",
)


def saved_steps(run: Path) -> list[str]:
    return [folder.name for folder in finished_checkpoints(run / "checkpoints")]


def number_of_steps(run: Path) -> int:
    return len((run / "metrics.jsonl").read_text().splitlines())


def test_the_first_ctrl_c_finishes_the_step_and_saves_it(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = Ranks(recipe_for(root, run, SETTINGS))
    ranks.wait_until(lambda: any((run / "unfinished" / "step-00000001").glob("*.pt")), 240)
    os.killpg(ranks.processes[0].pid, signal.SIGINT)  # as a terminal does: the verifiers hear it too
    log = ranks.wait(seconds=240)
    assert "Ctrl-C: the step is finished and saved first" in log
    assert f"asked to stop by SIGINT: saving after step {number_of_steps(run)}" in log
    assert saved_steps(run) == [f"step-{number_of_steps(run):08d}"]


def test_the_second_ctrl_c_gives_the_step_up_and_saves_those_before(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    long = ("generation.responses_per_prompt=48", "generation.max_requests=1")
    ranks = Ranks(recipe_for(root, run, (*SETTINGS, "train.prompts_per_step=1", *long)))
    ranks.wait_until(lambda: has_line(run, "metrics.jsonl", 1), 240)
    os.killpg(ranks.processes[0].pid, signal.SIGINT)
    ranks.wait_until(lambda: "Ctrl-C once more gives it up" in ranks.log.read_text(), 60)
    os.killpg(ranks.processes[0].pid, signal.SIGINT)
    log = ranks.wait(seconds=240)
    assert "step 2 is abandoned, as asked by a second SIGINT" in log
    assert saved_steps(run) == ["step-00000001"]


class Torchrun:
    """The command of the README, in the foreground of a terminal of its own."""

    def __init__(self, root: Path, run: Path, *options: str, settings: Sequence[str] = SETTINGS) -> None:
        recipe_for(root, run)
        self.run, self.log = run, run.with_name("torchrun.log")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]
        arguments = ["-m", "megatron_r1v2", "grpo", f"{run}.yaml", "parallel.tensor=2", *settings]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *arguments], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def interrupt_when(self, condition: Callable[[], bool]) -> None:
        """Press Ctrl-C: every process of the foreground group hears it."""
        deadline = time.monotonic() + 240
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self) -> str:
        self.process.wait(timeout=240)
        return self.log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_leaves_its_ranks_the_time_that_it_is_told(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    torchrun = Torchrun(root, run, "--shutdown-timeout", "200")
    torchrun.interrupt_when(lambda: any((run / "unfinished" / "step-00000001").glob("*.pt")))
    log = torchrun.wait()
    assert f"asked to stop by SIGINT: saving after step {number_of_steps(run)}" in log
    assert saved_steps(run) == [f"step-{number_of_steps(run):08d}"]
    assert "forcefully exiting" not in log


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_step_that_torchrun_does_not_wait_for_is_given_up_and_those_before_are_saved(
    root: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = (
        *SETTINGS,
        "train.prompts_per_step=1",
        "generation.responses_per_prompt=192",
        "generation.max_requests=1",
        "checkpoint.grace_seconds=20",
    )
    torchrun = Torchrun(root, run, settings=settings)
    torchrun.interrupt_when(lambda: has_line(run, "metrics.jsonl", 1))
    log = torchrun.wait()
    assert "a step of more than 9 s is given up; start torchrun with --shutdown-timeout 3600" in log
    assert "step 2 is abandoned, as asked by SIGINT, 30 s before torchrun kills" in log
    assert "saved after step 1, as the run is given up" in log
    assert saved_steps(run) == ["step-00000001"]
