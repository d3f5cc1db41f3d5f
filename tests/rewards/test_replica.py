"""The division of work in a replica of two ranks: a reward model on both, the workers on the leader."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_r1v2.config.schema import ParallelConfig, RewardConfig, RewardFunction
from megatron_r1v2.parallel import groups
from megatron_r1v2.rewards.replica import ReplicaScorer, ScoringError
from megatron_r1v2.rewards.verifiers import VerifierPool
from megatron_r1v2.types import Prompt, Rollout
from tests.ranks import run_ranks

SETTINGS = RewardConfig(format_weight=0.0, model_weight=0.5, model_centre=0.0, model_scale=1.0)
PROMPT = Prompt("a", (), (1,), torch.zeros(0, 3, 4, 4, dtype=torch.uint8), answer="8", answer_type="numeric")
TEXTS = {5: "x</think>\\boxed{8}", 6: "x</think>\\boxed{9}", 7: "<|im_end|>"}


class ByLength:
    """A reward model that gives ln 3 to the first response and -ln 3 to the others."""

    def __init__(self):
        self.asked = []

    def score(self, prompts, texts):
        self.asked.append(([prompt.key for prompt in prompts], list(texts)))
        return [math.log(3) if index == 0 else -math.log(3) for index in range(len(texts))]


class Broken:
    """A reward model that gives no number, as one does whose weights are damaged."""

    def score(self, prompts, texts):
        return [math.nan] * len(texts)


def _rollout(index, *token_ids, finish="stop"):
    return Rollout("a", index, token_ids, (0.0,) * len(token_ids), policy_version=0, finish_reason=finish)


def score(context, model, rollouts, settings=SETTINGS, prompt=PROMPT):
    pool = VerifierPool(1, 5.0) if context.is_replica_leader else None
    try:
        scorer = ReplicaScorer(
            settings,
            context,
            decode=lambda ids: "".join(TEXTS[token] for token in ids),
            pool=pool,
            reward_model=model,
            max_response_tokens=4,
        )
        return scorer.score({"a": prompt}, rollouts)
    finally:
        if pool is not None:
            pool.close()


def raised_by_a_function(parallel, of_rank):
    context = groups.initialize(parallel, seed=1)
    own = RewardFunction(path="tests/rewards/own_functions.py", name="fails_on_b")
    settings = RewardConfig(format_weight=0.0, functions=(own,))
    prompt = replace(PROMPT, metadata={"level": "2" if context.data_rank == of_rank else "1"})
    with pytest.raises(ScoringError) as raised:
        score(context, None, [_rollout(0, 5, 7)], settings, prompt=prompt)
    return str(raised.value)


@pytest.mark.parametrize(
    ("parallel", "of_rank"),
    [(ParallelConfig(tensor=2), 0), (ParallelConfig(pipeline=2), 0), (ParallelConfig(), 1)],
    ids=["tensor", "pipeline", "data"],
)
def test_a_function_that_fails_on_one_rank_ends_all(parallel, of_rank):
    first, second = run_ranks(2, raised_by_a_function, parallel, of_rank)
    assert first == second
    assert "fails_on_b failed for every response, the first to sample 'a': KeyError: 'level 2'" in first


def on_two_ranks():
    context = groups.initialize(ParallelConfig(tensor=2), seed=1)
    model = ByLength()
    scored, counts = score(context, model, [_rollout(0, 5, 7), _rollout(1, 6, finish="length")])
    nothing, _ = score(context, model, [])
    with pytest.raises(RuntimeError, match="2 of 2 responses no finite score"):
        score(context, Broken(), [_rollout(0, 5, 7), _rollout(1, 6, 7)])
    with pytest.raises(ValueError, match=r"reward.model_weight=0.5 but no reward model"):
        score(context, None, [_rollout(0, 5, 7)])
    rules = RewardConfig(format_weight=0.0)
    by_rules, _ = score(context, None, [_rollout(0, 5, 7)], rules)
    return {"asked": model.asked, "scored": scored, "counts": counts, "nothing": nothing, "by_rules": by_rules}


def test_every_rank_asks_the_model_and_gets_the_leaders_rewards():
    first, second = run_ranks(2, on_two_ranks)
    assert first == second
    assert first["asked"] == [(["a", "a"], ["x</think>\\boxed{8}", "x</think>\\boxed{9}"])]
    assert [dict(response.rewards) for response in first["scored"]] == [
        {"answer": 1.0, "format": 1.0, "model": pytest.approx(0.75)},
        {"answer": 0.0, "format": 1.0, "model": pytest.approx(0.25)},
    ]
    assert [response.total for response in first["scored"]] == pytest.approx([1.375, 0.125])
    assert [response.model_score for response in first["scored"]] == pytest.approx([math.log(3), -math.log(3)])
    assert first["nothing"] == []
    assert [(response.total, response.model_score) for response in first["by_rules"]] == [(1.0, None)]
