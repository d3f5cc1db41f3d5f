"""Validation while a stage runs: Pass@1 and hallucination on a split of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_r1v2.evaluation.evaluator import Evaluator, check_answered
from megatron_r1v2.evaluation.pass_at_1 import EvaluationResult
from megatron_r1v2.stages.calibrator import Calibrator
from megatron_r1v2.stages.session import Session


@dataclass(frozen=True)
class ValidationResult:
    """One validation of a running stage."""

    pass_at_1: float
    goal_reached: bool
    """Whether Pass@1 has reached `evaluation.stop_at_pass_at_1`."""


class Validation:
    """An evaluation every few steps, which feeds the calibrator and checks the goal of the stage."""

    def __init__(self, session: Session, evaluator: Evaluator, calibrator: Calibrator | None = None) -> None:
        """Read the validation split, when there is one.

        Args:
            calibrator: gets the hallucination rate whenever it is measured.
        """
        settings = session.recipe.evaluation
        self.session = session
        preemption = session.preemption
        # A signal must be heard, and a lost rank named, in a long validation too.
        self.evaluator = replace(
            evaluator, progress=preemption.poll_between_engine_steps, wait_for_all=preemption.wait_for_all
        )
        self.calibrator = calibrator
        folder = session.recipe.data.validation
        self.every_steps = settings.every_steps if folder else 0
        self.goal = settings.stop_at_pass_at_1
        self.prompts = list(session.loaded.read_prompts(folder, settings.prompts)) if self.every_steps else []
        check_answered(self.prompts)
        if calibrator is not None:
            calibrator.check(self.prompts, folder)

    def validate_if_due(self) -> ValidationResult | None:
        """Collective over the world: evaluate when it is time, and let the calibrator decide; None: it is not time."""
        session = self.session
        if not self.every_steps or session.step % self.every_steps:
            return None
        with session.recorder.timed("evaluate"):
            # The step has read its images; the next one begins with an empty cache.
            if session.policy.features is not None:
                session.policy.features.clear()
            result = self.evaluator.run(self.prompts, name="validation", step=session.step)
            # The tower may be trained before the next time, and training needs the memory.
            self.evaluator.features.clear()
        session.recorder.note(validation_metrics(result))
        if self.calibrator is not None:
            self.calibrator.observe(result.hallucination_rate, result.claim_coverage)
        goal_reached = bool(self.goal) and result.pass_at_1 >= self.goal
        if goal_reached:
            session.recorder.log(
                f"validation Pass@1 {result.pass_at_1:.3f} has reached evaluation.stop_at_pass_at_1={self.goal:g} "
                f"after {session.step} steps"
            )
        return ValidationResult(result.pass_at_1, goal_reached)


def validation_metrics(result: EvaluationResult) -> dict[str, float]:
    """Return the metrics of an evaluation: the hallucination rate never without the coverage that it rests on.

    Args:
        result: of the validation split. A rate without a denominator (no claims, no facts) is left out.
    """
    metrics = {"validation/pass_at_1": result.pass_at_1, "validation/format_rate": result.format_rate}
    if result.claim_coverage is not None:
        metrics["validation/claim_coverage"] = result.claim_coverage
    if result.hallucination_rate is not None:
        metrics["validation/hallucination_rate"] = result.hallucination_rate
    return metrics
