"""The loop of all stages: when it ends, when it saves, and with what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_r1v2.resilience.signals import StepAbandoned
from megatron_r1v2.stages.loop import run_steps
from megatron_r1v2.stages.validation import ValidationResult


class Scripted:
    """A session of some steps that writes down what is done with it."""

    def __init__(self, *, steps: int = 3, stop_after: int = 99, finished: bool = False) -> None:
        self.steps = steps
        self.step = 0
        self.done = finished
        self.events: list[Any] = []
        self.recorder = SimpleNamespace(timed=lambda phase: nullcontext(), log=self.events.append)
        self.preemption = SimpleNamespace(sync_stop_signal=lambda step: step >= stop_after)

    @contextmanager
    def save_on_error(self, state: Any, replay: Any) -> Iterator[None]:
        try:
            yield
        except ValueError:
            self.events.append((self.step, state(), replay()))
            raise

    @property
    def is_finished(self) -> bool:
        return self.done or self.step >= self.steps

    def should_save(self, *, last: bool, pass_at_1: float | None) -> bool:
        return last or pass_at_1 is not None

    def save(self, state: Any, replay: Any, *, pass_at_1: float | None) -> None:
        self.events.append((self.step, state, replay, pass_at_1))

    def end_step(self) -> None:
        self.events.append(f"end of {self.step}")

    def take_step(self) -> None:
        self.step += 1


def run(session: Any, **arguments: Any) -> list[Any]:
    run_steps(session, session.take_step, **arguments)
    return session.events


def test_the_last_step_is_saved_as_the_end_with_what_the_stage_carries() -> None:
    events = run(Scripted(), state=lambda: {"delta": 1}, replay=lambda: {"samples": 2})
    last = (3, {"finished": True, "delta": 1}, {"samples": 2}, None)
    assert events == ["end of 1", "end of 2", last, "end of 3"]


def test_a_request_to_stop_saves_an_unfinished_run() -> None:
    assert run(Scripted(stop_after=2)) == ["end of 1", (2, {"finished": False}, {}, None), "end of 2"]


def test_a_stage_that_is_finished_does_nothing() -> None:
    assert run(Scripted(finished=True)) == []


def test_a_validation_decides_what_is_saved_and_when_the_stage_ends() -> None:
    results = iter((None, ValidationResult(0.4, goal_reached=False), ValidationResult(0.9, goal_reached=True)))
    events = run(Scripted(steps=9), validate=lambda: next(results))
    assert events == [
        "end of 1",
        (2, {"finished": False}, {}, 0.4),
        "end of 2",
        (3, {"finished": True}, {}, 0.9),
        "end of 3",
    ]


def test_a_validation_that_is_given_up_loses_no_step() -> None:
    def abandon() -> None:
        raise StepAbandoned

    events = run(Scripted(stop_after=1), validate=abandon)
    assert "validation after step 1 is abandoned" in events[0]
    assert events[1:] == [(1, {"finished": False}, {}, None), "end of 1"]


def test_an_error_of_a_step_or_its_validation_is_saved_before() -> None:
    def fail() -> None:
        raise ValueError("no data")

    session = Scripted()
    with pytest.raises(ValueError, match="no data"):
        run(session, validate=fail, state=lambda: {"delta": 1})
    assert session.events == [(1, {"delta": 1}, {})]
    session = Scripted()
    session.take_step = fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no data"):
        run(session)
    assert session.events == [(0, {}, {})]
