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


class ScoringError(ValueError):
    """An error of the data under the rules, or of a reward function, raised on all ranks: bad input, no defect."""


Outcome = tuple[tuple[list[ScoredRollout], dict[str, float]], Exception | None]
"""Of `ReplicaScorer._score_by_rules`."""


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
        """Collective over the world: score the rollouts of each replica, as `score_rollouts`.

        Args:
            rollouts: the same on every rank of the replica.

        Returns:
            The scored rollouts of this replica and their sums for `reward_metrics`.

        Raises:
            ValueError: `reward.model_weight` has no scores to weigh.
            ScoringError: the rules or a reward function fail in a replica, on every rank of all.
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
        outcome: Outcome | None = None
        if self.context.is_replica_leader:
            outcome = self._score_by_rules(prompts, rollouts, texts, model_scores)
        if self.context.tensor_size * self.context.pipeline_size > 1:
            outcome = objects.broadcast_from_first(outcome, self.context.groups.mp)
        assert outcome is not None
        scored, error = outcome
        # Errors travel: a rank that raised alone would let the others wait for it in their next collective.
        if errors := [each for each in objects.all_gather(error, self.context.groups.dp) if each is not None]:
            raise ScoringError(str(errors[0])) from error or errors[0]
        return scored

    def _score_by_rules(
        self,
        prompts: Mapping[str, Prompt],
        rollouts: Sequence[Rollout],
        texts: Sequence[str],
        model_scores: Sequence[float] | None,
    ) -> Outcome:
        """Return what `score_rollouts` returns, or its error."""
        assert self.pool is not None, "the leader of a replica needs a VerifierPool"
        try:
            scored = score_rollouts(
                prompts,
                rollouts,
                texts,
                settings=self.settings,
                pool=self.pool,
                max_response_tokens=self.max_response_tokens,
                model_scores=model_scores,
            )
        except (ValueError, RuntimeError, OSError) as error:  # OSError: a file of functions that is gone
            return ([], {}), error
        return scored, None


def _without_stop(rollout: Rollout) -> Sequence[int]:
    return rollout.token_ids[:-1] if rollout.finish_reason == "stop" else rollout.token_ids
