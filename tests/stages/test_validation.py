"""Validation of a running stage: when it is due, what it writes, and when the goal is reached."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_r1v2.evaluation.pass_at_1 import EvaluationResult
from megatron_r1v2.stages.session import Session, open_session
from megatron_r1v2.stages.validation import Validation, ValidationResult, validation_metrics
from tests.stages.runs import recipe_for


def result_of(pass_at_1: float, **changes: Any) -> EvaluationResult:
    result = EvaluationResult("validation", pass_at_1, 0.0, (pass_at_1,), 1.0, None, None, 5.0, 2, 1.0, 1.0, 7, 3)
    return replace(result, **changes)


def test_a_rate_without_a_denominator_is_left_out() -> None:
    assert validation_metrics(result_of(0.5, hallucination_rate=None, claim_coverage=None)).keys() == {
        "validation/pass_at_1",
        "validation/format_rate",
    }
    metrics = validation_metrics(result_of(0.5, hallucination_rate=0.25, claim_coverage=0.75))
    assert metrics["validation/hallucination_rate"] == 0.25
    assert metrics["validation/claim_coverage"] == 0.75


class Recording:
    """A calibrator that only remembers."""

    def __init__(self) -> None:
        self.checked = 0
        self.observed: list[Any] = []

    def check(self, prompts: list[Any], folder: str) -> None:
        self.checked = len(prompts)

    def observe(self, rate: float | None, coverage: float | None) -> None:
        self.observed.append((rate, coverage))


def make_validation(session: Session, calibrator: Any = None, *, pass_at_1: float = 0.4) -> Validation:
    recipe, loaded = session.recipe, session.loaded
    with loaded.verifiers() as pool:
        evaluator = loaded.evaluator(loaded.engine(), pool, settings=recipe.evaluation, reward=recipe.reward)
        validation = Validation(session, evaluator, calibrator)
    result = result_of(pass_at_1, hallucination_rate=0.25, claim_coverage=0.5)
    features = validation.evaluator.features
    scripted: Any = SimpleNamespace(features=features, run=lambda prompts, name, step: result)
    validation.evaluator = scripted
    return validation


def due(validation: Validation) -> list[int]:
    """Return the steps of the first six after which it validates."""
    found = []
    for step in range(1, 7):
        validation.session.step = step
        if validation.validate_if_due() is not None:
            found.append(step)
    return found


def test_it_is_due_every_few_steps_and_tells_the_calibrator(root: Path, tmp_path: Path) -> None:
    settings = (f"data.validation={root / 'data'}", "evaluation.every_steps=3", "evaluation.prompts=2")
    with open_session(recipe_for(root, tmp_path / "run", settings), stage="align", shown=()) as session:
        assert due(make_validation(session)) == [3, 6]
        calibrator = Recording()
        assert due(make_validation(session, calibrator)) == [3, 6]
        assert calibrator.checked == 2
        assert calibrator.observed == [(0.25, 0.5)] * 2


def test_without_a_split_it_is_never_due(root: Path, tmp_path: Path) -> None:
    with open_session(recipe_for(root, tmp_path / "run"), stage="align", shown=()) as session:
        assert due(make_validation(session, Recording())) == []


@pytest.mark.parametrize(("pass_at_1", "reached"), [(0.49, False), (0.5, True)])
def test_the_goal_is_reached_by_pass_at_1(root: Path, tmp_path: Path, capfd, pass_at_1: float, reached: bool) -> None:
    settings = (
        f"data.validation={root / 'data'}",
        "evaluation.every_steps=1",
        "evaluation.prompts=2",
        "evaluation.stop_at_pass_at_1=0.5",
    )
    with open_session(recipe_for(root, tmp_path / "run", settings), stage="align", shown=()) as session:
        validation = make_validation(session, pass_at_1=pass_at_1)
        session.step = 1
        assert validation.validate_if_due() == ValidationResult(pass_at_1, reached)
        assert session.recorder.values["validation/pass_at_1"] == pass_at_1
        assert "timing_s/evaluate" in session.recorder.values
    assert ("has reached evaluation.stop_at_pass_at_1=0.5 after 1 steps" in capfd.readouterr().err) is reached


def test_it_polls_for_signals_while_it_generates(root: Path, tmp_path: Path) -> None:
    with open_session(recipe_for(root, tmp_path / "run"), stage="align", shown=()) as session:
        recipe, loaded = session.recipe, session.loaded
        with loaded.verifiers() as pool:
            evaluator = loaded.evaluator(loaded.engine(), pool, settings=recipe.evaluation, reward=recipe.reward)
        polling = Validation(session, evaluator).evaluator
        assert polling == replace(
            evaluator,
            progress=session.preemption.poll_between_engine_steps,
            wait_for_all=session.preemption.wait_for_all,
        )
