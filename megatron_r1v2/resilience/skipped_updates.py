"""Updates that are not made, because their gradient is not finite or too large: kept for inspection, and counted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1v2.config.schema import TrainConfig
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.types import TrainingBatch

FOLDER = "skipped"


class SkippedUpdates:
    """Writes what a skipped update was made of, and ends the run when too many in a row are."""

    def __init__(self, folder: Path, *, settings: TrainConfig, context: ParallelContext) -> None:
        """Prepare; writes nothing.

        Args:
            folder: where they go.
            settings: the bounds.
            context: the leader of each replica writes.
        """
        self.folder = folder
        self.settings = settings
        self.context = context
        self.in_a_row = 0

    def reason(self, *, finite: bool, gradient_norm: float | None) -> str | None:
        """Return why an update is not to be made; None: it is.

        Args:
            finite: whether the gradient is, on all ranks.
            gradient_norm: before clipping; None: it was not computed.
        """
        if not finite:
            return "its gradient is not finite"
        bound = self.settings.skip_above_grad_norm
        if bound and gradient_norm is not None and not gradient_norm <= bound:
            return f"its gradient norm {gradient_norm:.4g} is above train.skip_above_grad_norm={bound:g}"
        return None

    def add(self, batches: Sequence[TrainingBatch], *, version: int, reason: str) -> None:
        """Keep the microbatches of an update that is skipped; called together by all ranks.

        Args:
            batches: of this replica.
            version: optimizer steps before it.
            reason: why.

        Raises:
            RuntimeError: so many in a row are as many as the bound.
        """
        self.in_a_row += 1
        if self.context.is_replica_leader:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"update-{version + 1:08d}-{self.in_a_row}-replica-{self.context.data_rank}.pt"
            torch.save({"reason": reason, "version": version, "batches": [_plain(batch) for batch in batches]}, path)
        dist.barrier()  # a rank that ends the run must not take the others' files with it
        bound = self.settings.max_skipped_updates
        if self.in_a_row >= bound:
            raise RuntimeError(
                f"update {version + 1} was skipped, since {reason}; with it train.max_skipped_updates={bound} in a row "
                f"are. The weights are as they were before the first, and what they were made of is in {self.folder}. "
                "Lower train.learning_rate or set train.clip_grad, and start again; if the update before them broke "
                "the weights, delete the newest checkpoint, so that the one before is used"
            )

    def end_row(self) -> None:
        """Say that an update was made."""
        self.in_a_row = 0


def _plain(batch: TrainingBatch) -> dict[str, object]:
    """Return the fields as torch.load(weights_only=True) takes them, prompts by their keys."""
    fields = dict(vars(batch))
    fields["image_prompts"] = [prompt.key for prompt in batch.image_prompts]
    return fields
