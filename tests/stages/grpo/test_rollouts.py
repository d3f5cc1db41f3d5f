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


def test_groups_that_teach_something_are_counted(session: Session, phase: RolloutPhase) -> None:
    prompts, scored = phase.generate_and_score()
    images = {prompt.key for prompt in prompts if prompt.modality == "image"}
    mixed = [replace(response, rule_correct=response.rollout.sample_index == 0) for response in scored]
    assert phase.sum_effective_groups(prompts, mixed) == len(images), "text teaches the adapter nothing"
    uniform = [replace(response, rule_correct=True) for response in scored]
    assert phase.sum_effective_groups(prompts, uniform) == 0
