"""Scoring in a replica: rules on one rank, since workers on every rank multiply the work; a reward model on all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_r1v2.config.schema import RewardConfig
from megatron_r1v2.parallel import objects
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.rewards.model import RewardModel, check_scores
from megatron_r1v2.rewards.score import check_model_has_scores, prompts_of, score_rollouts
from megatron_r1v2.rewards.verifiers import VerifierPool
from megatron_r1v2.types import Prompt, Rollout, ScoredRollout


@dataclass(frozen=True)
class ReplicaScorer:
    """The means of a replica to score rollouts."""

    settings: RewardConfig
    context: ParallelContext
    decode: Callable[[Sequence[int]], str]
    """Token ids to text, special tokens included."""
    pool: VerifierPool | None
    """Worker processes; only the leader of the replica has them."""
    reward_model: RewardModel | None
    """Asked on every rank of the replica, since a model may be spread over them."""
    max_response_tokens: int
    """The length at which responses are cut."""

    def score(
        self, prompts: Mapping[str, Prompt], rollouts: Sequence[Rollout]
    ) -> tuple[list[ScoredRollout], dict[str, float]]:
        """Collective over the model-parallel group: score a replica's rollouts, as `score_rollouts`.

        Args:
            rollouts: the same on every rank of the replica.

        Returns:
            The scored rollouts and the sums for `reward_metrics`, on every rank of the replica.

        Raises:
            ValueError: as `score_rollouts`.
            RuntimeError: the reward model gives no usable scores, on every rank of the replica.
        """
        check_model_has_scores(self.settings, has_scores=self.reward_model is not None)
        texts: list[str] = []
        if self.context.is_replica_leader or self.reward_model is not None:
            texts = [self.decode(_without_stop(rollout)) for rollout in rollouts]
        model_scores: list[float] | None = None
        if self.reward_model is not None:
            model_scores = self.reward_model.score(prompts_of(rollouts, prompts), texts) if texts else []
            # On every rank, so that all of them raise: the others would wait for the leader's broadcast for ever.
            check_scores(model_scores, len(texts))
        scored = None
        if self.context.is_replica_leader:
            assert self.pool is not None, "the leader of a replica needs a VerifierPool"
            scored = score_rollouts(
                prompts,
                rollouts,
                texts,
                settings=self.settings,
                pool=self.pool,
                max_response_tokens=self.max_response_tokens,
                model_scores=model_scores,
            )
        if self.context.tensor_size * self.context.pipeline_size == 1:
            assert scored is not None
            return scored
        return objects.broadcast_from_first(scored, self.context.groups.mp)


def _without_stop(rollout: Rollout) -> Sequence[int]:
    return rollout.token_ids[:-1] if rollout.finish_reason == "stop" else rollout.token_ids
