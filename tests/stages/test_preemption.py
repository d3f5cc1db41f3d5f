"""A run that is asked to stop: what it publishes, gives up and says, on one rank."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.parallel import groups
from megatron_r1v2.resilience.rank_watch import RankWatch
from megatron_r1v2.resilience.signals import StepAbandoned, StopSignals
from megatron_r1v2.stages.preemption import PreemptionHandler


class Scripted:
    """A run whose checkpoints, rollouts and recorder write down what is done with them."""

    def __init__(self, run_dir: Path, *, lead_seconds: float = 0.0) -> None:
        self.context = groups.initialize(ParallelConfig(), seed=1)
        self.events: list[Any] = []
        self.values: dict[str, float] = {"timing_s/save": 2.0}
        self.step_seconds = 5.0
        self.written: int | None = None
        checkpoints: Any = SimpleNamespace(
            finish_pending=lambda blocking: self.events.append(("published", blocking)),
            newest_step=lambda: 7,
            written=lambda: self.written,
        )
        kept: Any = SimpleNamespace(drop_before=lambda step: self.events.append(("dropped", step)), enabled=True)
        recorder: Any = SimpleNamespace(
            log=self.events.append,
            note=self.values.update,
            values=self.values,
            step_seconds=lambda: self.step_seconds,
        )
        self.stop_signals = StopSignals(self.context.device)
        self.handler = PreemptionHandler(
            self.stop_signals,
            kept,
            checkpoints,
            lead_seconds=lead_seconds,
            recorder=recorder,
            watch=RankWatch(self.context.store, lambda: "here", limit_seconds=60),
            context=self.context,
        )

    def receive(self, number: signal.Signals) -> None:
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 120
        while number not in self.stop_signals._received and time.monotonic() < deadline:
            time.sleep(0.01)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Scripted]:
    scripted = Scripted(tmp_path, lead_seconds=10.0)
    try:
        with scripted.stop_signals:
            yield scripted
    finally:
        groups.shut_down()


def test_nothing_stops_a_run_that_nobody_asks(run: Scripted) -> None:
    assert not run.handler.sync_stop_signal(3)
    run.handler.poll_between_phases()
    assert run.events == [("published", False), ("dropped", 7)]


def test_sigusr1_ends_the_run_after_its_step(run: Scripted) -> None:
    run.receive(signal.SIGUSR1)
    run.handler.poll_between_phases()
    assert run.handler.sync_stop_signal(3)
    assert run.events[-1] == "asked to stop by SIGUSR1: saving after step 3; start again to go on"


def generate(handler: PreemptionHandler) -> None:
    for responses in range(8):
        handler.poll_between_engine_steps(responses, 5)


WHERE: dict[str, Callable[[PreemptionHandler], None]] = {
    "between phases": lambda handler: handler.poll_between_phases(),
    "while it generates": generate,
    "while it waits for others": lambda handler: handler.wait_for_all("generated"),
}


@pytest.mark.parametrize("where", WHERE)
def test_sigterm_gives_the_step_up(run: Scripted, where: str) -> None:
    run.receive(signal.SIGTERM)
    with pytest.raises(StepAbandoned):
        WHERE[where](run.handler)
    run.handler.log_step_abandoned(3, "SIGTERM")
    assert run.events[-1].startswith(
        "step 4 is abandoned, as asked by SIGTERM; finished rollouts are kept; start again"
    )


def test_a_checkpoint_is_published_while_the_next_step_generates(run: Scripted) -> None:
    run.written = 1
    for responses in range(7):
        run.handler.poll_between_engine_steps(responses, 5)
    assert run.events == [], "ranks of a replica look now and then only"
    run.handler.poll_between_engine_steps(7, 5)
    assert run.events == [("published", False), ("dropped", 7)]


def test_a_resumed_step_says_what_it_has_left(run: Scripted) -> None:
    run.handler.log_resumed_rollouts(2, 0, 6)
    assert run.events == []
    run.handler.log_resumed_rollouts(2, 4, 6)
    assert run.events == ["step 3: rollouts of 4 of 6 prompts are there from before"]


def test_the_lead_is_measured_and_a_short_one_told_when_it_gets_worse(run: Scripted) -> None:
    for seconds, margin, told in ((5.0, 3.0, 0), (9.0, -1.0, 1), (8.9, -0.9, 1), (12.0, -4.0, 2)):
        run.step_seconds = seconds
        run.handler.check_lead()
        assert run.values["preemption/lead_margin_s"] == pytest.approx(margin)
        assert len(run.events) == told
    assert "a step and a save have taken 14 s" in run.events[1]
    assert "raise --signal=B:USR1@21 of sbatch" in run.events[1]
