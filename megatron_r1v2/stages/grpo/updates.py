"""The training phase of a GRPO step: old log-probs of fresh samples, then the optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from megatron_r1v2.config.choices import LossAggregation
from megatron_r1v2.config.schema import AlgorithmConfig
from megatron_r1v2.monitoring.recorder import Recorder
from megatron_r1v2.rl.grpo import GrpoInputs, GrpoSettings, grpo_loss
from megatron_r1v2.rl.mismatch import check_mismatch, truncated_importance_weights
from megatron_r1v2.stages.grpo.selection import Selection
from megatron_r1v2.training.batches import with_old_log_probs
from megatron_r1v2.training.microbatches import Microbatcher
from megatron_r1v2.training.mismatch import compute_mismatch
from megatron_r1v2.training.optimizer import current_learning_rate
from megatron_r1v2.training.policy import Policy, UpdateResult
from megatron_r1v2.training.reference import ReferenceWeights
from megatron_r1v2.types import Prompt, Sample, TrainingBatch


class UpdatePhase:
    """Trains the policy on the samples of a step."""

    def __init__(
        self,
        policy: Policy,
        microbatcher: Microbatcher,
        *,
        settings: AlgorithmConfig,
        aggregation: LossAggregation,
        reference: ReferenceWeights | None,
        recorder: Recorder,
    ) -> None:
        """Put the parts together.

        Args:
            reference: where the loss has a KL term.
        """
        self.policy = policy
        self.microbatcher = microbatcher
        self.settings = settings
        self.aggregation = aggregation
        self.reference = reference
        self.recorder = recorder

    def add_old_log_probs(
        self, samples: Mapping[str, Sample], prompts: Mapping[str, Prompt]
    ) -> dict[str, Sample] | None:
        """Collective over the world: compute the training forward's log-probs of fresh samples.

        Replayed samples keep those they were stored with: the ratio is taken against the policy that sampled.

        Args:
            samples: those that this rank trains, by id.
            prompts: theirs, by key.

        Returns:
            The samples, all with old log-probs; None: some are not finite, and the update is skipped.

        Raises:
            ValueError: engine and training forward disagree by more than `algorithm.max_log_prob_difference`.
        """
        fresh = {name: sample for name, sample in samples.items() if sample.rl is not None and sample.rl.is_fresh}
        microbatches = self.microbatcher.split(fresh, prompts)
        batches = [part.batch for part in microbatches]
        log_probs = self.policy.compute_log_probs(batches)
        if self.policy.skip_update_if_not_finite(batches, log_probs):
            self.recorder.note({"actor/skipped_updates": 1.0})
            return None
        result = dict(samples)
        for part, log_probs_BS in zip(microbatches, log_probs, strict=True):
            for row, name in enumerate(part.names):
                result[name] = with_old_log_probs(fresh[name], log_probs_BS[row])
        # Only now, with the weights that sampled: after the first update engine and training differ rightly.
        metrics = compute_mismatch(batches, log_probs, self.policy.context)
        self.recorder.note(metrics)
        check_mismatch(metrics, self.settings.max_log_prob_difference)
        return result

    def take_updates(
        self, selection: Selection, samples: Mapping[str, Sample], prompts: Mapping[str, Prompt], *, filler: Prompt
    ) -> None:
        """Collective over the world: take the optimizer steps of a step; none where no sample has an advantage.

        Args:
            selection: the same on every rank.
            samples: those that this rank trains, by id.
            prompts: theirs, by key.
            filler: fills the microbatch of a rank that has no sample.
        """
        # Before the updates: afterwards the optimizer has the rate of the next step.
        learning_rate = current_learning_rate(self.policy.optimizer)
        loss = partial(
            batch_loss,
            algorithm=self.settings,
            aggregation=self.aggregation.value,
            denominator=selection.denominator,
        )
        results: list[UpdateResult] = []
        for update in selection.updates:
            mine = {name: samples[name] for name in update if name in samples}
            microbatches = self.microbatcher.split(mine, prompts, replayed=set(selection.plan.replayed))
            batches = [part.batch for part in microbatches] or [self.microbatcher.filler(filler)]
            results.append(self.policy.update(self._with_reference(batches), loss))
        self.recorder.note(
            {
                "actor/lr": learning_rate,
                "actor/updates": len(results),
                "actor/skipped_updates": float(sum(not result.applied for result in results)),
                **mean_of_updates([result.logged() for result in results]),
            }
        )

    def _with_reference(self, batches: list[TrainingBatch]) -> list[TrainingBatch]:
        """Collective over the replica: add the reference's log-probs where the loss has a KL term."""
        if self.reference is None:
            return batches
        with self.reference.in_place_of(self.policy.model):
            log_probs = self.policy.compute_log_probs(batches)
        return [
            replace(batch, reference_log_probs_BS=log_probs_BS)
            for batch, log_probs_BS in zip(batches, log_probs, strict=True)
        ]


def mean_of_updates(of_updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average the metrics of a step's optimizer steps; a metric that some lack is averaged over those that have it."""
    found: dict[str, list[float]] = {}
    for metrics in of_updates:
        for name, value in metrics.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def batch_loss(
    log_probs_BS: torch.Tensor,
    batch: TrainingBatch,
    *,
    algorithm: AlgorithmConfig,
    aggregation: str,
    denominator: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute the GRPO loss of a microbatch.

    Args:
        log_probs_BS: float32 [B, S] of the policy in training.
        denominator: of the whole batch over all ranks.

    Returns:
        This microbatch's part of the loss, and metrics as (sum, count) pairs.
    """
    importance_BS = None
    if algorithm.importance_cap > 0:
        importance_BS = truncated_importance_weights(
            batch.old_log_probs_BS, batch.rollout_log_probs_BS, algorithm.importance_cap
        )
    inputs = GrpoInputs(
        log_probs_BS,
        batch.old_log_probs_BS,
        batch.advantages_B,
        batch.response_mask_BS,
        weights_B=batch.weights_B,
        importance_weights_BS=importance_BS,
        reference_log_probs_BS=batch.reference_log_probs_BS,
        replayed_B=batch.replayed_B,
    )
    settings = GrpoSettings(
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        aggregation=aggregation,
        kl_coefficient=algorithm.kl_coefficient,
    )
    return grpo_loss(inputs, settings, denominator=denominator)
