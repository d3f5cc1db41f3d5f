"""The words for accepted values, and for refused ones."""

import pytest

from megatron_r1v2.config.recipes import every_section
from megatron_r1v2.config.schema import (
    BufferConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RewardConfig,
    RunConfig,
    TrainConfig,
)
from megatron_r1v2.config.wording import range_text, refusal, shorten, type_name


@pytest.mark.parametrize(
    ("section", "key", "words"),
    [
        (TrainConfig, "steps", "a whole number"),
        (TrainConfig, "learning_rate", "a number"),
        (TrainConfig, "recompute", "one of none, selective, full"),
        (TrainConfig, "parts", "a list, each one of vision, adapter, language, score"),
        (ModelConfig, "fp8_weights", "true or false"),
        (RunConfig, "output_dir", "text"),
        (RunConfig, "stage", "one of align, pairs, mpo, reward_model, grpo"),
        (ModelConfig, "transformer_config", "a mapping"),
        (RewardConfig, "functions", "a list, each {path, name, weight}"),
    ],
)
def test_types(section, key, words):
    assert type_name(section.model_fields[key].annotation) == words


@pytest.mark.parametrize(
    ("section", "key", "words"),
    [
        (TrainConfig, "steps", "1 or more"),
        (BufferConfig, "target_effective_fraction", "0 to 1"),
        (EvaluationConfig, "top_p", "more than 0, at most 1"),
        (RunConfig, "seed", "0 to 2147483647"),
        (TrainConfig, "adam_beta2", "0 to just below 1"),
        (DataConfig, "train", ""),
    ],
)
def test_bounds(section, key, words):
    assert range_text(section.model_fields[key]) == words


def test_every_setting_has_words():
    for section in every_section().values():
        for field in section.model_fields.values():
            assert type_name(field.annotation)
            range_text(field)


@pytest.mark.parametrize(
    ("key", "value", "kind", "message"),
    [
        ("steps", "many", "int_type", "train.steps='many' is not accepted; expected a whole number"),
        ("steps", True, "int_type", "train.steps is true; expected a whole number; remove the line for the default"),
        ("steps", None, "int_type", "train.steps is nothing; expected a whole number; remove the line for the default"),
        ("steps", 0, "greater_than_equal", "train.steps=0 is out of range; accepted: 1 or more"),
        (
            "learning_rate",
            float("nan"),
            "finite_number",
            "train.learning_rate=nan is out of range; accepted: 0 or more",
        ),
    ],
)
def test_refusals(key, value, kind, message):
    assert refusal(f"train.{key}", value, TrainConfig.model_fields[key], kind) == message


def test_an_empty_text_and_a_long_value():
    told = refusal("run.output_dir", " ", RunConfig.model_fields["output_dir"], "string_pattern_mismatch")
    assert told == "run.output_dir is empty; give a value"
    assert shorten("x" * 500) == "'" + "x" * 199 + "..."
    assert shorten("x" * 198) == repr("x" * 198)
