"""The model as the stages use it: log-probs of samples, and updates, through megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.models.log_probs import token_log_probs
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel import objects
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.rl.aggregation import mean_metrics
from megatron_r1v2.training.batches import LENGTH_MULTIPLE
from megatron_r1v2.training.denominators import loss_scale
from megatron_r1v2.training.packing import PackedBatch, pack
from megatron_r1v2.training.skipped_updates import SkippedUpdates
from megatron_r1v2.types import TrainingBatch

Metrics = dict[str, torch.Tensor]
"""Name to a tensor of shape [2]: a sum and a count, which add up over microbatches and ranks."""
LossFunction = Callable[[torch.Tensor, TrainingBatch], tuple[torch.Tensor, Metrics]]
"""(log_probs_BS, batch) to the local sum divided by the global denominator, and metrics."""

SKIPPED = "actor/skipped_updates"
"""1 for an update that was not made, since its gradient was not finite or too large."""
_LOSS = "actor/loss"


@dataclass
class Policy:
    """What is trained, with what trains it."""

    model: R1V2Model
    ddp: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    context: ParallelContext
    skipped: SkippedUpdates
    """What becomes of updates that must not be made."""
    temperature: float
    """Of the sampling distribution, whose log-probs these are."""
    vocab_size: int
    """Ids from here on are padding, in sampling and in training."""
    features: FeatureCache | None = None
    """Features of a frozen vision tower, computed once per image and step; None: the tower runs every time."""
    packed: bool = False
    """Lay the rows of a microbatch one after the other instead of padding them."""
    length_multiple: int = LENGTH_MULTIPLE
    """Lengths of packed sequences are multiples of this."""
    version: int = field(default=0)
    """Optimizer steps so far."""

    def log_probs(self, batches: Sequence[TrainingBatch]) -> list[torch.Tensor]:
        """Compute log-probs of the labels by the training forward, without a graph.

        Args:
            batches: this replica's microbatches; may be empty.

        Returns:
            float32 [B, S] for each batch, on every rank of the replica.
        """
        if not batches:
            return []
        with torch.no_grad():
            results = self._run(batches, _keep_log_probs, forward_only=True)
        if self.context.pipeline_size == 1:
            return results
        if not self.context.is_last_stage:
            results = [torch.empty_like(batch.response_mask_BS) for batch in batches]
        for result in results:
            dist.broadcast(result, src=self.context.last_stage_rank, group=self.context.groups.pp)
        return results

    def update(self, batches: Sequence[TrainingBatch], loss_function: LossFunction) -> dict[str, float]:
        """Take one optimizer step.

        Args:
            batches: this replica's microbatches; at least one (of weight zero where it has no sample).
            loss_function: its losses over all ranks and microbatches sum up to the loss.

        Returns:
            Metrics over all ranks, with the loss and the gradient norm; `actor/skipped_updates` alone when the update
            is skipped: then weights, optimizer, schedule and version are as they were.

        Raises:
            RuntimeError: too many updates in a row are skipped.
        """
        scale = loss_scale(num_microbatches=len(batches), data_size=self.context.data_size)
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._run(batches, partial(_scaled_loss, loss_function, scale), forward_only=False)
        if reason := self.skipped.reason(finite=self._is_gradient_finite(), gradient_norm=self._gradient_norm()):
            self.skipped.add(batches, version=self.version, reason=reason)
            return {SKIPPED: 1.0}
        self.skipped.end_row()
        _, gradient_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        self.version += 1
        combined = combine(sums if self.context.is_last_stage else [], self.context)
        return mean_metrics(combined) | {
            "actor/loss": float(combined[_LOSS][0]),
            "actor/grad_norm": float(gradient_norm or 0.0),
            SKIPPED: 0.0,
        }

    def _is_gradient_finite(self) -> bool:
        """Return whether the gradient is finite on all ranks: if not, a step would spoil the weights."""
        finite = all(bool(torch.isfinite(buffer.grad_data).all()) for buffer in self.ddp.buffers)
        return all(objects.all_gather(finite))

    def _gradient_norm(self) -> float | None:
        """Return the norm before clipping, the same on all ranks, where there is a bound on it."""
        if not self.skipped.settings.skip_above_grad_norm:
            return None
        self.optimizer.prepare_grads()
        return max(objects.all_gather(float(self.optimizer.get_grad_norm() or 0.0)))

    def _run(self, batches: Sequence[TrainingBatch], finish: Callable[..., Any], *, forward_only: bool) -> list[Any]:
        """Run microbatches through megatron-core's schedule; returns what `finish` gave, on the last stage."""
        return get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, finish),
            data_iterator=iter(batches),
            model=self.ddp,
            num_microbatches=len(batches),
            seq_length=max(batch.token_ids_BS.shape[1] for batch in batches),
            micro_batch_size=batches[0].token_ids_BS.shape[0],
            forward_only=forward_only,
        )

    def _forward_step(
        self, finish: Callable[..., Any], batches: Iterator[TrainingBatch], ddp: DistributedDataParallel
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, Any]]]:
        batch = next(batches)
        packed = self._pack(batch) if self.packed else None
        output = ddp(
            packed.token_ids_1S if packed else batch.token_ids_BS,
            packed.position_ids_1S if packed else batch.position_ids_BS,
            tiles_TCHW=batch.tiles_TCHW,
            features_TFK=self._cached_features(batch),
            tile_index=batch.tile_index,
            image_mask_BS=packed.image_mask_1S if packed else batch.image_mask_BS,
            packed_seq_params=packed.params if packed else None,
        )
        return output, partial(self._finish, finish, batch, packed)

    def _finish(
        self, finish: Callable[..., Any], batch: TrainingBatch, packed: PackedBatch | None, logits_BSV: torch.Tensor
    ) -> tuple[torch.Tensor, Any]:
        log_probs_BS = token_log_probs(
            logits_BSV,
            packed.labels_1S if packed else batch.labels_BS,
            temperature=self.temperature,
            vocab_size=self.vocab_size,
            groups=self.context.groups,
        )
        return finish(packed.unpack(log_probs_BS) if packed else log_probs_BS, batch)

    def _pack(self, batch: TrainingBatch) -> PackedBatch:
        return pack(batch, tensor_size=self.context.tensor_size, length_multiple=self.length_multiple)

    def _cached_features(self, batch: TrainingBatch) -> torch.Tensor | None:
        if self.features is None or not batch.image_prompts or not self.context.is_first_stage:
            return None
        return torch.cat(self.features.fill(batch.image_prompts, self.model))


def combine(sums: Sequence[Mapping[str, torch.Tensor]], context: ParallelContext) -> dict[str, torch.Tensor]:
    """Add (sum, count) pairs over microbatches and ranks.

    Args:
        sums: of this rank's microbatches; empty on ranks that do not hold the loss.
        context: one tensor-parallel rank of each replica counts.

    Returns:
        float64 pairs by name, on every rank.
    """
    local = add_pairs(sums) if context.tensor_rank == 0 else {}
    return add_pairs(objects.all_gather({name: pair.cpu() for name, pair in local.items()}))


def add_pairs(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Add tensors of equal names."""
    total: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, pair in part.items():
            total[name] = total[name] + pair.double() if name in total else pair.double()
    return total


def _keep_log_probs(log_probs_BS: torch.Tensor, batch: TrainingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    return log_probs_BS.sum(), log_probs_BS * batch.response_mask_BS


def _scaled_loss(
    loss_function: LossFunction, scale: float, log_probs_BS: torch.Tensor, batch: TrainingBatch
) -> tuple[torch.Tensor, Metrics]:
    loss, metrics = loss_function(log_probs_BS, batch)
    # Losses of microbatches add up to the loss, so it has no count to divide by.
    return loss * scale, {_LOSS: torch.stack([loss.detach(), torch.zeros_like(loss)]), **metrics}
