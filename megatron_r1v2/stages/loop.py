"""The loop that all stages share: steps until the stage is done or must stop, with checkpoints and numbers between."""

from __future__ import annotations

from collections.abc import Callable

from megatron_r1v2.resilience.signals import StepAbandoned
from megatron_r1v2.stages.session import Session, State
from megatron_r1v2.stages.validation import ValidationResult


def run_steps(
    session: Session,
    step: Callable[[], None],
    *,
    state: Callable[[], State] = dict,
    replay: Callable[[], State] = dict,
    validate: Callable[[], ValidationResult | None] = lambda: None,
) -> None:
    """Collective over the world: do steps until the last, the goal, or a request to stop; save as configured.

    Args:
        step: does one step and counts it in `session.step`.
        state: gives what the stage itself must restore when it goes on; the same on every rank.
        replay: gives what this data-parallel rank holds of the buffer.
        validate: called after each step; ends the stage when it has reached its goal.
    """
    finished, stopping = session.is_finished, False
    while not finished and not stopping:
        validated = None
        with session.save_on_error(state, replay):
            step()
            try:
                validated = validate()
            except StepAbandoned as reason:  # in its evaluation: the step is done, and saved below
                session.recorder.log(f"the validation after step {session.step} is abandoned, as asked by {reason}")
            finished = (validated is not None and validated.goal_reached) or session.is_finished
        # Once a step, here alone: all ranks must leave the loop after the same step.
        stopping = session.preemption.sync_stop_signal(session.step)
        pass_at_1 = validated.pass_at_1 if validated is not None else None
        if session.should_save(last=finished or stopping, pass_at_1=pass_at_1):
            with session.recorder.timed("save"):
                # Called now, not before: the validation may have moved the calibrator, whose state belongs to it.
                session.save({"finished": finished, **state()}, replay(), pass_at_1=pass_at_1)
        with session.save_on_error(state, replay):
            session.end_step()
