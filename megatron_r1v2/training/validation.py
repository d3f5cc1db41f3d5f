"""Pass@1 on a validation split while a stage runs."""

from __future__ import annotations

from megatron_r1v2.evaluation.evaluate import Evaluator
from megatron_r1v2.training.session import Session


class Validation:
    """Evaluates every few steps and says when the stage has reached what it is to reach."""

    def __init__(self, session: Session, evaluator: Evaluator) -> None:
        """Read the validation split, when there is one.

        Args:
            session: the running stage.
            evaluator: on the model in training.
        """
        settings = session.recipe.evaluation
        self.session = session
        self.evaluator = evaluator
        self.every_steps = settings.every_steps if session.recipe.data.validation else 0
        self.goal = settings.stop_at_pass_at_1
        self.prompts = (
            session.read_prompts(session.recipe.data.validation, settings.prompts) if self.every_steps else []
        )

    def is_reached(self) -> bool:
        """Evaluate when it is time; return whether validation Pass@1 has reached `evaluation.stop_at_pass_at_1`."""
        session = self.session
        if not self.every_steps or session.step % self.every_steps:
            return False
        with session.recorder.timed("evaluate"):
            self.evaluator.features.clear()
            result, _, _ = self.evaluator.run(self.prompts, name="validation", step=session.step)
        session.recorder.note({"validation/pass_at_1": result.pass_at_1, "validation/format_rate": result.format_rate})
        session.pass_at_1 = result.pass_at_1
        if not self.goal or result.pass_at_1 < self.goal:
            return False
        session.recorder.say(
            f"validation Pass@1 {result.pass_at_1:.3f} has reached evaluation.stop_at_pass_at_1={self.goal:g} "
            f"after {session.step} steps"
        )
        return True
