"""Updates that are left out, because their gradient is not finite or too large: kept for inspection, and counted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.resilience.files import atomic_file
from megatron_r1v2.types import TrainingBatch

FOLDER = "skipped"
MAX_IN_A_ROW = 3
"""So many skipped updates in a row end the run: by then it is the weights or the data, not chance."""


class SkippedUpdates:
    """A store of the batches of skipped updates, which ends the run when too many in a row are skipped.

    Args:
        max_gradient_norm: above which an update is skipped; 0: no bound (train.skip_above_grad_norm).
        context: the leader of each replica writes.
    """

    def __init__(self, folder: Path, *, max_gradient_norm: float, context: ParallelContext) -> None:
        self.folder = folder
        self.max_gradient_norm = max_gradient_norm
        self.context = context
        self.in_a_row = 0

    def reason(self, *, finite: bool, gradient_norm: float | None) -> str | None:
        """Return why an update must be skipped; None: it can be applied.

        Args:
            finite: whether the gradient is, on all ranks.
            gradient_norm: before clipping; None: it was not computed.
        """
        if not finite:
            return "its gradient is not finite"
        bound = self.max_gradient_norm
        # "not <=" and not ">": a norm of NaN is above every bound.
        if bound and gradient_norm is not None and not gradient_norm <= bound:
            return f"its gradient norm {gradient_norm:.4g} is above train.skip_above_grad_norm={bound:g}"
        return None

    def add(self, batches: Sequence[TrainingBatch], *, version: int, reason: str) -> None:
        """Collective over the world: keep the microbatches of a skipped update, and count it.

        Args:
            batches: of this replica.
            version: optimizer steps before it.

        Raises:
            RuntimeError: as many in a row are skipped as the bound.
        """
        self.in_a_row += 1
        if self.context.is_replica_leader:
            name = f"update-{version + 1:08d}-{self.in_a_row}-replica-{self.context.data_rank}.pt"
            with atomic_file(self.folder / name) as file:
                torch.save(
                    {"reason": reason, "version": version, "batches": [_loadable(batch) for batch in batches]}, file
                )
        dist.barrier()  # a rank that ends the run must not take the others' files with it
        if self.in_a_row >= MAX_IN_A_ROW:
            raise RuntimeError(
                f"update {version + 1} was skipped, since {reason}; with it {MAX_IN_A_ROW} in a row are. "
                f"The weights are as they were before the first, and what they were made of is in {self.folder}. "
                "Lower train.learning_rate or set train.clip_grad, and start again; if the update before them broke "
                "the weights, delete the newest checkpoint, so that the one before is used"
            )

    def end_row(self) -> None:
        """Count from 0 again, after an update that was applied."""
        self.in_a_row = 0


def _loadable(batch: TrainingBatch) -> dict[str, object]:
    """Return the fields as torch.load(weights_only=True) takes them, prompts by their keys."""
    fields = dict(vars(batch))
    fields["image_prompts"] = [prompt.key for prompt in batch.image_prompts]
    return fields
