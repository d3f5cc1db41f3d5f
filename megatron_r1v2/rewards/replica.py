"""Scoring in a replica: rules on one rank, since workers on every rank multiply the work; a reward model on all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_r1v2.config.schema import RewardConfig
from megatron_r1v2.parallel import objects
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.rewards.model import RewardModel, check_scores
from megatron_r1v2.rewards.score import check_model_scores_are_there, prompts_of, score_rollouts
from megatron_r1v2.rewards.verifiers import VerifierPool
from megatron_r1v2.types import Prompt, Rollout, ScoredRollout


def score_in_replica(
    prompts: Mapping[str, Prompt],
    rollouts: Sequence[Rollout],
    *,
    decode: Callable[[Sequence[int]], str],
    settings: RewardConfig,
    pool: VerifierPool | None,
    context: ParallelContext,
    max_response_tokens: int,
    reward_model: RewardModel | None = None,
) -> tuple[list[ScoredRollout], dict[str, float]]:
    """Score a replica's rollouts on its leader, and tell the other ranks.

    Args:
        prompts: by key.
        rollouts: the same on every rank of the replica.
        decode: token ids to text, special tokens included.
        settings: the `reward` section.
        pool: worker processes; only the leader has one.
        context: decides who is the leader.
        max_response_tokens: where responses are cut.
        reward_model: asked on every rank of the replica, since a model may be spread over them.

    Returns:
        As `score_rollouts`, on every rank of the replica.

    Raises:
        ValueError: as `score_rollouts`.
        RuntimeError: the reward model gives no usable scores, on every rank of the replica.
    """
    check_model_scores_are_there(settings, there=reward_model is not None)
    texts: list[str] = []
    if context.is_replica_leader or reward_model is not None:
        texts = [decode(_without_stop(rollout)) for rollout in rollouts]
    model_scores: list[float] | None = None
    if reward_model is not None:
        model_scores = reward_model.score(prompts_of(rollouts, prompts), texts) if texts else []
        check_scores(model_scores, len(texts))
    outcome = None
    if context.is_replica_leader:
        assert pool is not None, "the leader of a replica needs a VerifierPool"
        outcome = score_rollouts(
            prompts,
            rollouts,
            texts,
            settings=settings,
            pool=pool,
            max_response_tokens=max_response_tokens,
            model_scores=model_scores,
        )
    if context.tensor_size * context.pipeline_size == 1:
        assert outcome is not None
        return outcome
    return objects.broadcast_from_first(outcome, context.groups.mp)


def _without_stop(rollout: Rollout) -> Sequence[int]:
    return rollout.token_ids[:-1] if rollout.finish_reason == "stop" else rollout.token_ids
