"""The model as the stages use it: log-probs of samples, and updates, through megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_r1v2.models.log_probs import token_entropy, token_log_probs
from megatron_r1v2.parallel import objects
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.resilience.skipped_updates import SkippedUpdates
from megatron_r1v2.rl.aggregation import mean_metrics
from megatron_r1v2.training.denominators import loss_scale
from megatron_r1v2.training.forward import Finish, Forward, Result
from megatron_r1v2.training.packing import PackedBatch
from megatron_r1v2.types import TrainingBatch

Metrics = dict[str, torch.Tensor]
"""Name to a tensor of shape [2]: a sum and a count, which add up over microbatches and ranks."""
LossFunction = Callable[[torch.Tensor, TrainingBatch], tuple[torch.Tensor, Metrics]]
"""(log_probs_BS or scores_BS, batch) to the local sum divided by the global denominator, and metrics."""
BeforeStep = Callable[[Sequence[torch.Tensor]], None]
"""Looks at the log-probs of an update, float32 [B, S] for each microbatch, before the weights move; may raise."""

_LOSS = "actor/loss"
_LOG_PROB_NOT_FINITE = "a log-prob of the training forward is not finite"


@dataclass(frozen=True)
class UpdateResult:
    """The outcome of one optimizer step; the same on every rank but for `log_probs`."""

    reason: str | None
    """Why the step was not taken; None: it was taken."""
    loss: float | None
    """Over all ranks and microbatches; None where the step was not taken."""
    gradient_norm: float
    """Before clipping; 0 where the step was not taken."""
    log_probs: tuple[torch.Tensor, ...]
    """float32 [B, S] for each microbatch, zero outside the responses, by the weights before the step (a reward model's
    scores likewise). The last pipeline stage has them; the others, which see no logits, get an empty tuple unless
    `before_step` was given."""
    metrics: Mapping[str, float]
    """Of the loss function, over all ranks; empty where the step was not taken."""
    finite: bool = True
    """Whether the gradients were, and the log-probs where `before_step` was given."""

    @property
    def applied(self) -> bool:
        """Return whether the step was taken."""
        return self.reason is None

    def logged(self) -> dict[str, float]:
        """Return the metrics with loss and gradient norm; empty where the step was not taken."""
        if self.loss is None:
            return {}
        return {**self.metrics, "actor/loss": self.loss, "actor/grad_norm": self.gradient_norm}


@dataclass(kw_only=True)
class Policy(Forward):
    """The model in training, with its optimizer and schedule."""

    ddp: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    skipped: SkippedUpdates
    """Keeps and counts the updates that must not be made."""
    temperature: float
    """Of the sampling distribution: log-probs are those of the tempered logits."""
    vocab_size: int
    """Ids from here on are padding, in sampling and in training."""
    measures_entropy: bool = False
    """Whether updates compute the entropy of their rows."""
    version: int = field(default=0)
    """Optimizer steps so far."""

    @property
    def module(self) -> DistributedDataParallel:
        """Return the module that the schedule runs: the model in the wrapper that collects its gradients."""
        return self.ddp

    def read(self, output: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        """Return the log-probs of the labels, or the scores of a reward model in training, as float32 [B, S].

        Args:
            output: of the last stage: logits [B, S, V / TP], or scores [B, S].
        """
        if self.model.is_reward_model:
            return output
        return token_log_probs(
            output,
            labels_BS,
            temperature=self.temperature,
            vocab_size=self.vocab_size,
            groups=self.context.groups,
        )

    def _finish(
        self, finish: Finish[Result], batch: TrainingBatch, row: PackedBatch, output: torch.Tensor
    ) -> tuple[torch.Tensor, Result]:
        # Here the logits are; log-probs alone are computed without a graph.
        if self.measures_entropy and torch.is_grad_enabled():
            entropy_1S = token_entropy(
                output, temperature=self.temperature, vocab_size=self.vocab_size, groups=self.context.groups
            )
            batch = replace(batch, entropy_BS=row.unpack(entropy_1S))
        return super()._finish(finish, batch, row, output)

    def compute_log_probs(self, batches: Sequence[TrainingBatch]) -> list[torch.Tensor]:
        """Collective over the replica: compute log-probs of the labels by the training forward, without a graph.

        Args:
            batches: this replica's microbatches; may be empty.

        Returns:
            float32 [B, S] for each batch, on every rank of the replica.
        """
        return self.compute_values(batches)

    def update(
        self,
        batches: Sequence[TrainingBatch],
        loss_function: LossFunction,
        *,
        before_step: BeforeStep | None = None,
    ) -> UpdateResult:
        """Collective over the world: take one optimizer step.

        Args:
            batches: this replica's microbatches; at least one (of weight zero where it has no sample).
            loss_function: its losses over all ranks and microbatches sum up to the loss.
            before_step: called with the log-probs, on every rank, unless the step is skipped; log-probs that are not
                finite then skip it too.

        Returns:
            The result; where it was not applied, weights, optimizer, schedule and version are as they were.

        Raises:
            RuntimeError: too many updates in a row are skipped.
        """
        scale = loss_scale(num_microbatches=len(batches), data_size=self.context.data_size)
        # Both: the buffers into which DDP accumulates, and the gradients of the optimizer's own copies.
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = self.run(batches, partial(_scaled_loss, loss_function, scale), forward_only=False)
        sums = [metrics for metrics, _ in results]
        log_probs = [values_BS for _, values_BS in results]
        # Before the optimizer moves: a step on NaN would spoil weights and moments for good.
        reason: str | None = _LOG_PROB_NOT_FINITE
        finite = True
        if before_step is not None:
            log_probs = self.broadcast_from_last_stage(log_probs, batches)
            # Those of replayed rows are not kept: what is wrong with them shows in the gradient.
            fresh = [values_BS[~batch.replayed_B] for values_BS, batch in zip(log_probs, batches, strict=True)]
            finite = self._all_finite(fresh)
        if finite:
            finite = self._all_gradients_finite()
            reason = self.skipped.reason(finite=finite, gradient_norm=self._largest_gradient_norm())
        if reason is not None:
            self.skipped.add(batches, version=self.version, reason=reason)
            return UpdateResult(reason, None, 0.0, tuple(log_probs), {}, finite)
        if before_step is not None:
            before_step(log_probs)
        self.skipped.end_row()
        _, gradient_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        self.version += 1
        # Only the last stage has seen the loss.
        combined = combine(sums if self.context.is_last_stage else [], self.context)
        loss = float(combined.pop(_LOSS)[0])
        return UpdateResult(None, loss, float(gradient_norm or 0.0), tuple(log_probs), mean_metrics(combined))

    def skip_update_if_not_finite(self, batches: Sequence[TrainingBatch], log_probs: Sequence[torch.Tensor]) -> bool:
        """Collective over the world: skip the update that samples are meant for when a log-prob is not finite.

        Args:
            batches: this replica's microbatches; may be empty.
            log_probs: float32 [B, S] for each, of the training forward.

        Returns:
            Whether it is skipped: the batches are kept, and the update counts as one.

        Raises:
            RuntimeError: too many updates in a row are skipped.
        """
        if self._all_finite(log_probs):
            return False
        self.skipped.add(batches, version=self.version, reason=_LOG_PROB_NOT_FINITE)
        return True

    def _all_finite(self, log_probs: Sequence[torch.Tensor]) -> bool:
        """Collective over the world: agree on whether the log-probs of all ranks are finite."""
        return all(objects.all_gather(all(bool(torch.isfinite(values_BS).all()) for values_BS in log_probs)))

    def _all_gradients_finite(self) -> bool:
        """Collective over the world: agree on whether a step would leave the weights finite."""
        return all(objects.all_gather(all(is_finite(buffer.grad_data) for buffer in self.ddp.buffers)))

    def _largest_gradient_norm(self) -> float | None:
        """Collective over the world: compute the norm before clipping, where there is a bound on it."""
        if not self.skipped.max_gradient_norm:
            return None
        # It copies the gradients to where get_grad_norm reads them; the step does so again.
        self.optimizer.prepare_grads()
        # The largest: a pipeline stage that trains nothing has a norm of 0.
        return max(objects.all_gather(float(self.optimizer.get_grad_norm() or 0.0)))


def is_finite(values: torch.Tensor) -> bool:
    """Return whether no element is infinite or NaN; takes no memory."""
    # `torch.isfinite` of a buffer of gradients takes 7 bytes an element; the least and the greatest carry a NaN.
    return all(bool(bound.isfinite()) for bound in torch.aminmax(values))


def combine(sums: Sequence[Mapping[str, torch.Tensor]], context: ParallelContext) -> dict[str, torch.Tensor]:
    """Collective over the world: add (sum, count) pairs over microbatches and ranks.

    Args:
        sums: of this rank's microbatches; empty on ranks that do not hold the loss.
        context: one tensor-parallel rank of each replica counts.

    Returns:
        float64 pairs by name, on every rank.
    """
    # The other tensor-parallel ranks have computed the same sums.
    local = add_pairs(sums) if context.tensor_rank == 0 else {}
    return add_pairs(objects.all_gather({name: pair.cpu() for name, pair in local.items()}))


def add_pairs(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Add tensors of equal names, in float64: sums over many tokens must not depend on how they are split."""
    total: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, pair in part.items():
            total[name] = total[name] + pair.double() if name in total else pair.double()
    return total


def _scaled_loss(
    loss_function: LossFunction, scale: float, values_BS: torch.Tensor, batch: TrainingBatch
) -> tuple[torch.Tensor, tuple[Metrics, torch.Tensor]]:
    loss, metrics = loss_function(values_BS, batch)
    # Losses of microbatches add up to the loss, so it has no count to divide by.
    sums = {_LOSS: torch.stack([loss.detach(), torch.zeros_like(loss)]), **metrics}
    return loss * scale, (sums, values_BS.detach() * batch.response_mask_BS)
