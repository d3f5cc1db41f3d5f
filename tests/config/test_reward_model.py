"""Which settings of a reward model belong together."""

import pytest

from megatron_r1v2.config.reward_model import check_score_head, check_score_source
from megatron_r1v2.config.schema import EvaluationConfig, Part, RewardConfig, RewardModelConfig, RunRecipe, TrainConfig


def recipe(weight: float = 0.0, **source) -> RunRecipe:
    return RunRecipe(reward=RewardConfig(model_weight=weight), reward_model=RewardModelConfig(**source))


@pytest.mark.parametrize(
    ("weight", "source", "message"),
    [
        (0.5, {}, r"reward.model_weight=0.5 needs one source of scores, got none; set reward_model.checkpoint"),
        (
            0.5,
            {"checkpoint": "a", "url": "http://127.0.0.1:1"},
            r"got reward_model.checkpoint='a' and reward_model.url='http://127.0.0.1:1'",
        ),
        (0.0, {"checkpoint": "a"}, r"reward_model.checkpoint='a' would never be asked while reward.model_weight=0"),
        (0.0, {"url": "http://127.0.0.1:1"}, r"reward_model.url='http://127.0.0.1:1' would never be asked"),
        (
            0.5,
            {"url": "http://127.0.0.1:1", "hf_path": "c"},
            r"reward_model.hf_path='c' belongs to a reward_model.checkpoint",
        ),
        (0.5, {"url": "b:80"}, r"reward_model.url='b:80' is no address"),
        (
            0.5,
            {"url": "http://127.0.0.1:1", "api_key_variable": "sk-12"},
            r"must be the name of an environment variable",
        ),
    ],
)
def test_sources_that_contradict_each_other_are_refused(weight, source, message):
    with pytest.raises(ValueError, match=message):
        check_score_source(recipe(weight, **source))


def test_a_key_is_not_repeated_in_the_error():
    with pytest.raises(ValueError, match="environment variable") as caught:
        check_score_source(recipe(0.5, url="http://127.0.0.1:1", api_key_variable="sk-secret"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("weight", "source"),
    [
        (0.0, {}),
        (0.5, {"checkpoint": "a", "hf_path": "b"}),
        (0.5, {"url": "https://127.0.0.1:8001/v1", "api_key_variable": "KEY"}),
    ],
)
def test_one_source_that_counts_is_accepted(weight, source):
    check_score_source(recipe(weight, **source))


def test_the_head_trains_in_its_stage_and_nowhere_else():
    with_head = RunRecipe(train=TrainConfig(parts=[Part.adapter, Part.score]))
    without = RunRecipe()
    check_score_head(with_head, is_reward_model=True)
    check_score_head(without, is_reward_model=False)
    with pytest.raises(ValueError, match=r"add score, e.g. train.parts=\[adapter, score\]"):
        check_score_head(without, is_reward_model=True)
    with pytest.raises(ValueError, match="only the reward_model stage has a score head; take score out"):
        check_score_head(with_head, is_reward_model=False)
    with_head.evaluation = EvaluationConfig(stop_at_pass_at_1=0.5)
    with pytest.raises(ValueError, match="a reward model answers nothing"):
        check_score_head(with_head, is_reward_model=True)
