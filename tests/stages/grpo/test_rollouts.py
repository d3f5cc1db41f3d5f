"""The rollout phase on a real engine: every prompt answered and scored, in order, with verified weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_r1v2.stages.grpo.rollouts import RolloutPhase
from megatron_r1v2.stages.grpo.stage import GrpoStage
from megatron_r1v2.stages.session import Session, open_session
from tests.stages.runs import recipe_for

PROMPTS, RESPONSES = 6, 4


@pytest.fixture
def session(root: Path, tmp_path: Path) -> Iterator[Session]:
    with open_session(recipe_for(root, tmp_path / "run"), stage="grpo", shown=()) as opened:
        yield opened


@pytest.fixture
def phase(session: Session) -> Iterator[RolloutPhase]:
    recipe = session.recipe
    with session.loaded.verifiers() as pool:
        yield GrpoStage(session, recipe, pool).rollouts


def test_every_prompt_has_its_responses_in_order(session: Session, phase: RolloutPhase) -> None:
    prompts, scored = phase.generate_and_score()
    assert len(prompts) == PROMPTS
    places = [(response.rollout.prompt_key, response.rollout.sample_index) for response in scored]
    assert places == [(prompt.key, index) for prompt in prompts for index in range(RESPONSES)]
    values = session.recorder.values
    assert values["rollout/rounds"] == 1
    assert values["reward/answer/mean"] == sum(response.rule_correct for response in scored) / len(scored)
    assert {"timing_s/gate", "timing_s/generate", "timing_s/reward"} <= values.keys()
    assert phase.features is session.policy.features, "the update computes with the same features"
    assert len(phase.features) > 0


def test_features_of_a_tower_that_trains_are_not_held_during_the_update(root: Path, tmp_path: Path) -> None:
    recipe = recipe_for(root, tmp_path / "run", ("train.parts=[vision]",))
    with open_session(recipe, stage="grpo", shown=()) as session, session.loaded.verifiers() as pool:
        phase = GrpoStage(session, recipe, pool).rollouts
        phase.generate_and_score()
        assert session.policy.features is None
        assert phase.features.prompts_computed > 0
        assert len(phase.features) == 0


def test_other_weights_than_at_the_start_are_noticed_before_generation(session: Session, phase: RolloutPhase) -> None:
    prompts = session.next_prompts()
    phase.verify_weights(prompts)
    assert session.recorder.values["gate/log_prob_abs_diff"] < 1e-4
    next(session.model.vision.parameters()).data.view(-1).view(torch.int32)[0] ^= 1
    with pytest.raises(RuntimeError, match="vision weights do not train, but have changed"):
        phase.verify_weights(prompts)


@pytest.mark.parametrize(("step", "moved", "expected"), [(1, False, False), (1, True, True), (3, False, True)])
def test_the_gate_runs_first_and_after_a_change_and_now_and_then(
    root: Path, tmp_path: Path, step: int, moved: bool, expected: bool
) -> None:
    recipe = recipe_for(root, tmp_path / "run", ("algorithm.gate_every=3",))
    with open_session(recipe, stage="grpo", shown=()) as session, session.loaded.verifiers() as pool:
        phase = GrpoStage(session, recipe, pool).rollouts
        prompts = session.next_prompts()
        session.step = 2  # resumed here, between two gates
        for number, due in ((2, True), (step, expected)):
            session.step = number
            session.recorder.values.pop("gate/log_prob_abs_diff", None)
            phase.verify_weights(prompts)
            assert ("gate/log_prob_abs_diff" in session.recorder.values) == due
            if moved:
                phase.calibrator.configured += 0.5


def test_the_prompts_of_the_next_step_are_read_while_this_one_generates(session: Session, phase: RolloutPhase) -> None:
    phase.generate_and_score()
    position = session.stream.state_dict()
    assert session.stream.samples_read == position["tally"]["read"] == PROMPTS
    ahead = session.stream._ahead
    assert ahead is not None
    read = ahead.prompts.result()
    assert session.next_prompts() == [prompt for prompt in read if session.trains(prompt)]
    session.step = session.recipe.train.steps - 1
    phase.generate_and_score()
    assert session.stream._ahead is None, "there is no step after the last"


def test_groups_that_teach_something_are_counted(session: Session, phase: RolloutPhase) -> None:
    prompts, scored = phase.generate_and_score()
    images = {prompt.key for prompt in prompts if prompt.modality == "image"}
    mixed = [replace(response, rule_correct=response.rollout.sample_index == 0) for response in scored]
    assert phase.sum_effective_groups(prompts, mixed) == len(images), "text teaches the adapter nothing"
    uniform = [replace(response, rule_correct=True) for response in scored]
    assert phase.sum_effective_groups(prompts, uniform) == 0
