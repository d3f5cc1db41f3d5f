"""The forward pass: microbatches through megatron-core's schedules, one number for each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from megatron_r1v2.config.choices import Packing
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel import objects
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.training.batches import LENGTH_MULTIPLE
from megatron_r1v2.training.packing import PackedBatch, pack, share, tokens_in_shared_row
from megatron_r1v2.types import TrainingBatch

Result = TypeVar("Result")
Finish = Callable[[torch.Tensor, TrainingBatch], tuple[torch.Tensor, Result]]
"""(values_BS, batch) to a loss and what to return for the microbatch."""


@dataclass(kw_only=True)
class Forward:
    """The forward pass of a reward model; `training.policy.Policy` turns the output into log-probs and adds updates."""

    model: R1V2Model
    context: ParallelContext
    features: FeatureCache | None = None
    """Features of a frozen vision tower, computed once per image and step; None: the tower runs every time."""
    packing: Packing = Packing.shared
    """The layout of the rows of a microbatch."""
    length_multiple: int = LENGTH_MULTIPLE
    """Lengths of packed sequences, or of a shared row, are multiples of this."""

    @property
    def module(self) -> torch.nn.Module:
        """Return the module that the schedule runs."""
        return self.model

    def read(self, output: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Turn the last stage's output into float32 [B, S], a number for each token: here the scores as they are."""
        return output

    def compute_values(self, batches: Sequence[TrainingBatch]) -> list[torch.Tensor]:
        """Collective over the replica: compute the number of each response token, without a graph.

        Args:
            batches: this replica's microbatches; may be empty.

        Returns:
            float32 [B, S] for each batch, zero outside the responses, on every rank of the replica.
        """
        if not batches:
            return []
        with torch.no_grad():
            results = self.run(batches, _keep_values, forward_only=True)
        return self.broadcast_from_last_stage(results, batches)

    def broadcast_from_last_stage(
        self, values: list[torch.Tensor], batches: Sequence[TrainingBatch]
    ) -> list[torch.Tensor]:
        """Collective over the pipeline stages: give every stage what the schedule leaves on the last one.

        Args:
            values: float32 [B, S] for each batch, on the last stage.

        Returns:
            The same on every stage: each keeps them with its samples.
        """
        if self.context.pipeline_size == 1:
            return values
        if not self.context.is_last_stage:
            values = [torch.empty_like(batch.response_mask_BS) for batch in batches]
        for value_BS in values:
            dist.broadcast(value_BS, src=self.context.last_stage_rank, group=self.context.groups.pp)
        return values

    def run(self, batches: Sequence[TrainingBatch], finish: Finish[Result], *, forward_only: bool) -> list[Result]:
        """Collective over the replica: run microbatches through megatron-core's schedule.

        Args:
            batches: at least one.
            finish: called on the last stage.

        Returns:
            The second value of `finish` for each microbatch, on the last stage; empty on the others.
        """
        results: list[Result] = get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, finish),
            data_iterator=iter(batches),
            model=self.module,
            num_microbatches=len(batches),
            # Sizes for buffers only: the model exchanges real shapes between stages, since microbatches differ.
            seq_length=max(batch.token_ids_BS.shape[1] for batch in batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        # A later stage would hold the last microbatch's input, and its gradient, until its next pass.
        self.model.set_input_tensor([None])
        return results

    def count_tokens(self, phase: str, batches: Sequence[TrainingBatch]) -> dict[str, float]:
        """Collective over the data-parallel ranks: count the tokens that a phase computes, padding aside.

        Args:
            phase: names the metrics.
            batches: this replica's microbatches; may be empty.

        Returns:
            The tokens computed, and those of rows that each have a prompt of their own.
        """
        separate = sum(
            # The last token of a row is a label only.
            sum(batch.num_prompt_tokens_B) + sum(batch.num_response_tokens_B) - len(batch.num_prompt_tokens_B)
            for batch in batches
        )
        computed = sum(map(tokens_in_shared_row, batches)) if self.packing is Packing.shared else separate
        counts = objects.all_gather((computed, separate), self.context.groups.dp)
        return {
            f"perf/{phase}_tokens": sum(ours for ours, _ in counts),
            f"perf/{phase}_tokens_separate": sum(theirs for _, theirs in counts),
        }

    def _forward_step(
        self, finish: Finish[Result], batches: Iterator[TrainingBatch], module: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, Result]]]:
        batch = next(batches)
        row = self._lay_out(batch)
        features_TFK = self._cached_features(batch)
        runs_tower = features_TFK is None and self.context.is_first_stage
        output = module(
            row.token_ids_1S,
            row.position_ids_1S,
            tiles_TCHW=batch.tiles_TCHW.to(self.context.device) if runs_tower else None,
            features_TFK=features_TFK,
            tile_index=row.tile_index,
            image_mask_BS=row.image_mask_1S,
            packed_seq_params=row.params,
        )
        return output, partial(self._finish, finish, batch, row)

    def _finish(
        self, finish: Finish[Result], batch: TrainingBatch, row: PackedBatch, output: torch.Tensor
    ) -> tuple[torch.Tensor, Result]:
        return finish(row.unpack(self.read(output, row.labels_1R)), batch)

    def _lay_out(self, batch: TrainingBatch) -> PackedBatch:
        lay_out = share if self.packing is Packing.shared else pack
        return lay_out(batch, tensor_size=self.context.tensor_size, length_multiple=self.length_multiple)

    def _cached_features(self, batch: TrainingBatch) -> torch.Tensor | None:
        # Only the first stage holds the vision tower.
        if self.features is None or not batch.image_prompts or not self.context.is_first_stage:
            return None
        return torch.cat(self.features.fill(batch.image_prompts, self.model))


def _keep_values(values_BS: torch.Tensor, batch: TrainingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    # The schedule wants a scalar loss, also where nothing is differentiated.
    return values_BS.sum(), values_BS * batch.response_mask_BS
