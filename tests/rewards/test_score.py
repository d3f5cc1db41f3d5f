import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1v2.config.schema import RewardConfig
from megatron_r1v2.rewards.score import reward_metrics, score_rollouts, shuffle_rewards
from megatron_r1v2.rewards.verifiers import VerifierPool
from megatron_r1v2.types import Prompt, Rollout, ScoredRollout

SETTINGS = RewardConfig(answer_weight=1.0, format_weight=0.25, claim_pattern=r"(?P<name>left|right) (?P<value>\d)")
GOOD = r"left 3, right 5, 3+5=8</think>\boxed{8}"


def _prompt(key, answer="8", answer_type="numeric", facts=None):
    return Prompt(
        key=key,
        messages=({"role": "user", "content": "<image>\nAdd them."},),
        token_ids=(1, 2),
        tiles_TCHW=torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
        answer=answer,
        answer_type=answer_type,
        facts={"left": "3", "right": "5"} if facts is None else facts,
    )


def _rollout(key, sample_index=0):
    return Rollout(key, sample_index, (5, 6), (-0.5, -0.5), policy_version=0, finish_reason="stop")


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(2, 1.0) as made:
        yield made


def _score(pool, texts, prompts, settings=SETTINGS, model_scores=None):
    rollouts = [_rollout(prompt.key, index) for index, prompt in enumerate(prompts)]
    by_key = {prompt.key: prompt for prompt in prompts}
    return score_rollouts(
        by_key, rollouts, texts, settings=settings, pool=pool, max_response_tokens=32, model_scores=model_scores
    )


def test_total_is_the_weighted_sum_of_parts_that_are_logged_alone(pool):
    prompt = _prompt("a")
    texts = [
        GOOD,
        r"left 3, right 4</think>\boxed{7}",  # well-formed, wrong, one hallucination of two claims
        r"left 3, right 5 \boxed{8}",  # right, not well-formed
        "no idea",
    ]
    scored, counts = _score(pool, texts, [prompt] * 4)
    assert [dict(response.rewards) for response in scored] == [
        {"answer": 1.0, "format": 1.0},
        {"answer": 0.0, "format": 1.0},
        {"answer": 1.0, "format": 0.0},
        {"answer": 0.0, "format": 0.0},
    ]
    assert [response.total for response in scored] == [1.25, 0.25, 1.0, 0.0]
    assert [response.rule_correct for response in scored] == [True, False, True, False]
    assert [response.rollout.sample_index for response in scored] == [0, 1, 2, 3]
    assert [response.text for response in scored] == texts
    assert scored[1].claims == (("left", "3"), ("right", "4"))
    assert scored[3].claims == ()
    assert reward_metrics(counts) == pytest.approx(
        {
            "critic/rewards/mean": 2.5 / 4,
            "reward/answer/mean": 0.5,
            "reward/format/mean": 0.5,
            "hallucination/rate": 1 / 6,
            "hallucination/coverage": 3 / 4,
            "verifier/timeouts": 0,
            "verifier/crashes": 0,
        }
    )


def test_a_reward_model_and_a_prompt_without_facts(pool):
    settings = SETTINGS.changed(consistency_weight=0.25, model_weight=0.5, model_centre=0.0, model_scale=1.0)
    prompts = [_prompt("a"), _prompt("a"), _prompt("b", facts={})]
    texts = [GOOD, r"3+5=8</think>\boxed{8}", GOOD]
    scored, counts = _score(pool, texts, prompts, settings, model_scores=[math.log(3), 0.0, -math.log(3)])
    assert [dict(response.rewards) for response in scored] == [
        {"answer": 1.0, "format": 1.0, "consistency": 1.0, "model": pytest.approx(0.75)},
        {"answer": 1.0, "format": 1.0, "consistency": 0.0, "model": pytest.approx(0.5)},  # says nothing of the image
        {"answer": 1.0, "format": 1.0, "model": pytest.approx(0.25)},
    ]
    # W = 2; the third has 1.75 of it: (1 + 0.25 + 0.125) x 2 / 1.75.
    assert [response.total for response in scored] == pytest.approx([1.875, 1.5, 1.375 * 2 / 1.75])
    assert [response.model_score for response in scored] == [math.log(3), 0.0, -math.log(3)]
    metrics = reward_metrics(counts)
    assert metrics["reward/consistency/mean"] == 0.5
    assert metrics["reward/model/mean"] == pytest.approx(0.5)
    assert metrics["reward_model/score/mean"] == pytest.approx(0.0)
    assert "reward/steps/mean" not in metrics


def test_a_reward_model_without_scores_is_an_error_and_not_a_zero(pool):
    weighted = SETTINGS.changed(model_weight=0.5)
    with pytest.raises(ValueError, match="reward.model_weight=0.5 but no reward model"):
        _score(pool, [GOOD], [_prompt("a")], weighted)
    with pytest.raises(RuntimeError, match="no finite score"):
        _score(pool, [GOOD], [_prompt("a")], weighted, model_scores=[float("nan")])
    with pytest.raises(RuntimeError, match="2 scores for 1 responses"):
        _score(pool, [GOOD], [_prompt("a")], weighted, model_scores=[1.0, 2.0])
    # Without a weight it is only shown.
    [response], counts = _score(pool, [GOOD], [_prompt("a")], SETTINGS, model_scores=[-3.5])
    assert response.total == 1.25
    assert reward_metrics(counts)["reward/model/mean"] == 0.5


def test_counts_of_two_ranks_add_up_to_the_metrics_of_one(pool):
    prompts = [_prompt(key) for key in "abcde"]
    texts = [GOOD, GOOD, "left 9", "", r"left 3</think>\boxed{7}"]
    _, whole = _score(pool, texts, prompts)
    _, first = _score(pool, texts[:1], prompts[:1])
    _, rest = _score(pool, texts[1:], prompts[1:])
    _, nothing = _score(pool, [], [])
    assert {name: first[name] + rest[name] + nothing[name] for name in whole} == whole


def test_a_rate_without_a_denominator_is_left_out(pool):
    _, counts = _score(pool, [], [])
    assert reward_metrics(counts) == {"verifier/timeouts": 0, "verifier/crashes": 0}
    _, counts = _score(pool, [GOOD], [_prompt("a")], SETTINGS.changed(claim_pattern=""))
    assert "hallucination/rate" not in reward_metrics(counts)
    assert reward_metrics(counts)["hallucination/coverage"] == 0
    json.dumps(counts, allow_nan=False)


def test_hostile_answers_and_claims_cost_only_their_own_score(pool):
    hang = "left 3</think>\\boxed{9^{9^{9}}}"
    prompts = [_prompt("a", answer_type="math"), _prompt("b")]
    scored, counts = _score(pool, [hang, GOOD], prompts)
    assert [response.total for response in scored] == [0.25, 1.25]
    assert scored[0].claims == (("left", "3"),)
    assert (counts["verifier_timeouts"], counts["verifier_crashes"]) == (1, 0)

    careless = SETTINGS.changed(claim_pattern=r"(?P<name>(l+)+) (?P<value>\d)")
    scored, counts = _score(pool, [GOOD + "l" * 60, GOOD], [_prompt("a"), _prompt("b")], careless)
    assert [response.total for response in scored] == [1.25, 1.25]
    assert scored[0].claims == ()
    assert (counts["verifier_timeouts"], counts["verifier_crashes"]) == (1, 0)


def test_what_does_not_fit_together_is_an_error(pool):
    with pytest.raises(ValueError, match="1 rollouts came with 2 texts"):
        _score(pool, ["", ""], [_prompt("a")])
    with pytest.raises(ValueError, match=r"no prompt for rollouts of \['b'\]"):
        score_rollouts({"a": _prompt("a")}, [_rollout("b")], [""], settings=SETTINGS, pool=pool, max_response_tokens=32)
    with pytest.raises(ValueError, match="reward.claim_pattern"):
        _score(pool, [""], [_prompt("a")], SETTINGS.changed(claim_pattern="(?P<name>x)"))


def _responses(count):
    return [
        ScoredRollout(
            rollout=_rollout("a", index),
            text=f"text {index}",
            rewards={"answer": float(index), "format": -float(index)},
            total=10.0 * index,
            rule_correct=index % 3 == 0,
            claims=(("left", str(index)),),
            model_score=-float(index),
        )
        for index in range(count)
    ]


@given(st.integers(0, 40), st.integers(0, 2**63 - 1))
def test_shuffled_rewards_are_dealt_to_wrong_responses(count, seed):
    scored = _responses(count)
    shuffled = shuffle_rewards(scored, seed=seed)
    assert [(r.rollout, r.text, r.claims) for r in shuffled] == [(r.rollout, r.text, r.claims) for r in scored]
    assert sorted(r.total for r in shuffled) == [r.total for r in scored]
    for before, after in zip(scored, shuffled, strict=True):
        giver = scored[int(after.total / 10)]
        assert (after.rewards, after.rule_correct) == (giver.rewards, giver.rule_correct)
        assert after.model_score == giver.model_score
        assert count == 1 or after.total != before.total
    assert shuffle_rewards(scored, seed=seed) == shuffled


def test_the_shuffle_reaches_every_other_response_equally_often():
    deals = Counter(
        (index, r.total) for seed in range(3000) for index, r in enumerate(shuffle_rewards(_responses(4), seed=seed))
    )
    assert len(deals) == 12
    assert all(850 < count < 1150 for count in deals.values())
