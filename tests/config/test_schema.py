"""The sections: defaults inside their bounds, a meaning for each setting, nothing that can be changed afterwards."""

import dataclasses

import pytest
from pydantic import ValidationError

from megatron_r1v2.config.choices import Part, Recompute
from megatron_r1v2.config.recipes import every_section
from megatron_r1v2.config.schema import (
    GenerationConfig,
    ModelConfig,
    RewardConfig,
    RewardModelConfig,
    RunConfig,
    TrainConfig,
)

MOST_SETTINGS = 120
SETTINGS = [
    pytest.param(section, key, id=f"{name}.{key}")
    for name, section in every_section().items()
    for key in section.model_fields
]


def test_there_are_few_enough_settings_to_read_them_all():
    assert len(SETTINGS) <= MOST_SETTINGS


@pytest.mark.parametrize(("section", "key"), SETTINGS)
def test_a_setting_has_a_meaning_and_a_default_inside_its_bounds(section, key):
    field = section.model_fields[key]
    assert field.description, "no sentence below it"
    default = field.get_default(call_default_factory=True)
    assert getattr(section(**{key: default}), key) == default
    if field.annotation in (int, float):
        assert field.metadata, "a number without bounds"


@pytest.mark.parametrize(("section", "key"), SETTINGS)
def test_a_setting_cannot_be_changed_afterwards(section, key):
    with pytest.raises(ValidationError, match="frozen"):
        setattr(section(), key, None)


def test_values_are_not_bent_into_shape():
    for section, settings in (
        (RunConfig, {"output_dir": 3}),
        (RunConfig, {"seed": "3"}),
        (TrainConfig, {"steps": True}),
        (TrainConfig, {"steps": 2.0}),
        (TrainConfig, {"learning_rate": "1e-3"}),
        (TrainConfig, {"learning_rate": float("inf")}),
        (TrainConfig, {"parts": "adapter"}),
        (ModelConfig, {"fp8_weights": 1}),
        (GenerationConfig, {"stop_tokens": [""]}),
        (TrainConfig, {"stepz": 1}),
    ):
        with pytest.raises(ValidationError):
            section(**settings)
    assert TrainConfig(parts=["vision"], recompute="full", learning_rate=1) == TrainConfig(
        parts=(Part.vision,), recompute=Recompute.full, learning_rate=1.0
    )


def test_a_changed_copy_is_checked_and_leaves_the_first_as_it_was():
    first = TrainConfig(steps=3)
    second = first.changed(steps=4, parts=["language"])
    assert (first.steps, second.steps, second.parts) == (3, 4, (Part.language,))
    assert second.learning_rate == first.learning_rate
    with pytest.raises(ValidationError):
        first.changed(steps=0)
    with pytest.raises(TypeError):
        dataclasses.replace(first, steps=5)


def test_weights_are_named_after_their_parts():
    weights = RewardConfig(steps_weight=0.5).weights
    assert weights["steps"] == 0.5
    assert set(weights) == {"answer", "format", "consistency", "steps", "repetition", "overlong", "model"}


def test_own_functions_have_weights_by_their_names():
    reward = RewardConfig(functions=[{"path": "a.py", "name": "near", "weight": 2}, {"path": "a.py", "name": "short"}])
    assert (reward.weights["near"], reward.weights["short"], reward.weights["answer"]) == (2.0, 1.0, 1.0)
    assert reward.functions[0].path == "a.py"
    for wrong in ({"path": "a.py"}, {"path": "a.py", "name": "f", "weight": -1}, {"path": 1, "name": "f"}, "a.py"):
        with pytest.raises(ValidationError):
            RewardConfig(functions=[wrong])


def test_a_reward_model_lies_beside_the_policy_where_it_has_a_checkpoint_and_no_server():
    assert RewardModelConfig(checkpoint="runs/reward").lies_beside_policy
    assert not RewardModelConfig(url="http://127.0.0.1:8001").lies_beside_policy
    assert not RewardModelConfig().lies_beside_policy
