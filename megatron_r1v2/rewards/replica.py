"""Scoring on one rank of a replica: worker processes on every GPU's rank would only multiply the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_r1v2.config.schema import RewardConfig
from megatron_r1v2.parallel import objects
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.rewards.score import score_rollouts
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
) -> tuple[list[ScoredRollout], dict[str, float]]:
    """Score a replica's rollouts on its leader, and tell the other ranks.

    Args:
        prompts: by key.
        rollouts: the same on every rank of the replica.
        decode: token ids to text, special tokens included.
        settings: the `reward` section.
        pool: worker processes; only the leader has one.
        context: decides who is the leader.

    Returns:
        As `score_rollouts`, on every rank of the replica.
    """
    outcome = None
    if context.is_replica_leader:
        assert pool is not None, "the leader of a replica needs a VerifierPool"
        texts = [decode(_without_stop(rollout)) for rollout in rollouts]
        outcome = score_rollouts(prompts, rollouts, texts, settings=settings, pool=pool)
    if context.tensor_size * context.pipeline_size == 1:
        assert outcome is not None
        return outcome
    return objects.broadcast_from_first(outcome, context.groups.mp)


def _without_stop(rollout: Rollout) -> Sequence[int]:
    return rollout.token_ids[:-1] if rollout.finish_reason == "stop" else rollout.token_ids
