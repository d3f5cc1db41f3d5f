"""The loop that all stages share: steps until the stage is done or must stop, with checkpoints and numbers between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_r1v2.resilience.signals import StepAbandoned
from megatron_r1v2.stages.session import Session

State = Mapping[str, Any]


def run_steps(
    session: Session,
    step: Callable[[], None],
    *,
    state: Callable[[], State] = dict,
    replay: Callable[[], State] = dict,
    is_reached: Callable[[], bool] = lambda: False,
) -> None:
    """Do steps until `train.steps`, until the goal is reached, or until the run is asked to stop; save as configured.

    Args:
        session: the running stage.
        step: does one step and counts it in `session.step`.
        state: gives what the stage itself must restore when it goes on; the same on every rank.
        replay: gives what this data-parallel rank holds of the buffer.
        is_reached: called after each step; whether the stage has reached what it is to reach.
    """
    finished, stopping = session.is_finished, False
    while not finished and not stopping:
        step()
        try:
            finished = is_reached() or session.is_finished
        except StepAbandoned:  # in its evaluation: the step is done, and saved below
            session.recorder.say(f"the validation after step {session.step} is abandoned, as asked by SIGTERM")
        stopping = session.sync_stop_signal()
        if session.should_save(last=finished or stopping):
            with session.recorder.timed("save"):
                session.save({"finished": finished, **state()}, replay())
        session.end_step()
