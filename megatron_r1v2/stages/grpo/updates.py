"""The training phase of a GRPO step: old log-probs of fresh samples, then the optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from megatron_r1v2.config.choices import LossAggregation
from megatron_r1v2.config.schema import AlgorithmConfig
from megatron_r1v2.monitoring.recorder import Recorder
from megatron_r1v2.rl.aggregation import sum_and_count, token_weights
from megatron_r1v2.rl.grpo import GrpoInputs, GrpoSettings, grpo_loss
from megatron_r1v2.rl.mismatch import check_mismatch, truncated_importance_weights
from megatron_r1v2.stages.grpo.selection import Selection
from megatron_r1v2.training.batches import with_old_log_probs
from megatron_r1v2.training.microbatches import Microbatch, Microbatcher
from megatron_r1v2.training.mismatch import compute_mismatch
from megatron_r1v2.training.optimizer import current_learning_rate
from megatron_r1v2.training.policy import Policy, UpdateResult
from megatron_r1v2.training.reference import ReferenceWeights
from megatron_r1v2.types import Prompt, Sample, TrainingBatch


class UpdatePhase:
    """The training of the policy on the samples of a step."""

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

        Returns:
            The samples, all with old log-probs; None: some are not finite, and the update is skipped.

        Raises:
            ValueError: engine and training forward disagree by more than `algorithm.max_log_prob_difference`.
        """
        fresh = {name: sample for name, sample in samples.items() if sample.rl is not None and sample.rl.is_fresh}
        microbatches = self.microbatcher.split(fresh, prompts)
        batches = [part.batch for part in microbatches]
        self.recorder.note(self.policy.count_tokens("log_probs", batches))
        log_probs = self.policy.compute_log_probs(batches)
        if self.policy.skip_update_if_not_finite(batches, log_probs):
            self.recorder.note({"actor/skipped_updates": 1.0})
            return None
        result = {**samples, **_with_log_probs(fresh, microbatches, log_probs)}
        # Only now, with the weights that sampled: after the first update engine and training differ rightly.
        self._check_engine(batches, log_probs)
        return result

    def take_updates(
        self, selection: Selection, samples: Mapping[str, Sample], prompts: Mapping[str, Prompt], *, filler: Prompt
    ) -> dict[str, Sample] | None:
        """Collective over the world: take the optimizer steps of a step; none where no sample has an advantage.

        A step of one update computes the old log-probs of its fresh samples on the way: its forward pass comes before
        the weights move.

        Args:
            samples: those that this rank trains, by id.
            filler: fills the microbatch of a rank that has no sample.

        Returns:
            The samples, all with old log-probs; None: the only update was skipped, since its numbers are not finite.

        Raises:
            ValueError: engine and training forward disagree by more than `algorithm.max_log_prob_difference`.
        """
        # Before the updates: afterwards the optimizer has the rate of the next step.
        learning_rate = current_learning_rate(self.policy.optimizer)
        loss = partial(
            batch_loss,
            algorithm=self.settings,
            aggregation=self.aggregation.value,
            denominator=selection.denominator,
        )
        trained = dict(samples)
        results: list[UpdateResult] = []
        computed: list[TrainingBatch] = []
        for update in selection.updates:
            mine = {name: samples[name] for name in update if name in samples}
            microbatches = self.microbatcher.split(mine, prompts, replayed=set(selection.plan.replayed))
            batches = [part.batch for part in microbatches] or [self.microbatcher.filler(filler)]
            check = partial(self._check_engine, batches) if _is_only_update(selection) else None
            result = self.policy.update(self._with_reference(batches), loss, before_step=check)
            results.append(result)
            computed += [part.batch for part in microbatches]
            if check is not None:
                trained |= _with_log_probs(mine, microbatches, result.log_probs)
        self.recorder.note(
            {
                **self.policy.count_tokens("update", computed),
                "actor/lr": learning_rate,
                "actor/updates": len(results),
                "actor/skipped_updates": float(sum(not result.applied for result in results)),
                **mean_of_updates([result.logged() for result in results]),
            }
        )
        if _is_only_update(selection) and not results[0].finite:
            return None
        return trained

    def _check_engine(self, batches: Sequence[TrainingBatch], log_probs: Sequence[torch.Tensor]) -> None:
        """Collective over the world: compare the engine's log-probs of fresh samples with the training forward's."""
        metrics = compute_mismatch(batches, log_probs, self.policy.context)
        self.recorder.note(metrics)
        check_mismatch(metrics, self.settings.max_log_prob_difference)

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


def _is_only_update(selection: Selection) -> bool:
    """Return whether a step has one update, whose own forward pass then gives the old log-probs of fresh samples."""
    return len(selection.updates) == 1


def _with_log_probs(
    samples: Mapping[str, Sample], microbatches: Sequence[Microbatch], log_probs: Sequence[torch.Tensor]
) -> dict[str, Sample]:
    """Return the samples of the microbatches, those without old log-probs with these.

    Args:
        log_probs: float32 [B, S] for each microbatch.
    """
    # A rank without samples has the log-probs of a filler.
    return {
        name: with_old_log_probs(sample, log_probs_BS[row]) if sample.rl is not None and sample.rl.is_fresh else sample
        for part, log_probs_BS in zip(microbatches, log_probs, strict=False)
        for row, name in enumerate(part.names)
        for sample in (samples[name],)
    }


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
    # Tokens without an old log-prob were sampled with these weights: their ratio is 1, and only its gradient matters.
    old_log_probs_BS = batch.old_log_probs_BS.where(~batch.old_log_probs_BS.isnan(), log_probs_BS.detach())
    importance_BS = None
    if algorithm.importance_cap > 0:
        importance_BS = truncated_importance_weights(
            old_log_probs_BS, batch.rollout_log_probs_BS, algorithm.importance_cap
        )
    inputs = GrpoInputs(
        log_probs_BS,
        old_log_probs_BS,
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
    loss, metrics = grpo_loss(inputs, settings, denominator=denominator)
    return loss, {**metrics, **entropy_metrics(batch)}


def entropy_metrics(batch: TrainingBatch) -> dict[str, torch.Tensor]:
    """Return the entropy of the policy at the response tokens of a microbatch as (sum, count) pairs."""
    if batch.entropy_BS is None:
        return {}
    weights_BS = token_weights(batch.response_mask_BS, "token", batch.weights_B)
    rows = {"": torch.ones_like(batch.has_image_B), "_image": batch.has_image_B, "_text": ~batch.has_image_B}
    return {
        f"actor/entropy{suffix}": sum_and_count(batch.entropy_BS, weights_BS * rows_B[:, None])
        for suffix, rows_B in rows.items()
    }
