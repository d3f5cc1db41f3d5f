"""Checksums of the weights by part: equal on all data-parallel replicas, at every layout, and in the checkpoint.

The checksum of a part is the sum, modulo 2^63, of a number mixed from the bits of each element and the name of its
tensor. Zero counts zero, so padding does not show; a tensor that several ranks hold is counted once; the order of the
elements within a tensor does not show either, which is the price of not depending on the layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_r1v2.checkpoint.megatron.tensor_checksum import MODULUS, tensor_checksum
from megatron_r1v2.config.choices import Part
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel import objects
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.training.part_state import part_state


def compute_checksums(model: R1V2Model, parts: Iterable[Part], context: ParallelContext) -> dict[str, int]:
    """Collective over the replica: compute the checksum of each part."""
    names = sorted(Part(part).value for part in parts)
    sums = torch.zeros(len(names), dtype=torch.int64, device=context.device)
    for entry in part_state(model, parts).values():
        if _is_counted_here(entry):
            sums[names.index(entry.key.split(".", 1)[0])] += tensor_checksum(entry.data, entry.key)
    # Over the model-parallel ranks: together they hold each element once.
    dist.all_reduce(sums, group=context.groups.mp)
    return {name: value % MODULUS for name, value in zip(names, sums.tolist(), strict=True)}


def check_replicas(checksums: Mapping[str, int], context: ParallelContext) -> None:
    """Collective over the data-parallel ranks: check that every replica has the same weights.

    Raises:
        RuntimeError: on every rank, when they differ.
    """
    gathered = objects.all_gather(dict(checksums), context.groups.dp)
    for name in checksums:
        values = [part[name] for part in gathered]
        if len(set(values)) > 1:
            message = ", ".join(f"replica {rank}: {value:016x}" for rank, value in enumerate(values))
            raise RuntimeError(
                f"the {name} weights of the data-parallel replicas differ (checksums {message}): a rank has computed "
                "or received something else; take its node out and start again from the newest checkpoint"
            )


def check_loaded(checksums: Mapping[str, int], saved: Mapping[str, int], source: Path | None) -> None:
    """Check that what was loaded is what was saved.

    Args:
        saved: those of when they were saved, by part; a part that it does not name is not compared.

    Raises:
        RuntimeError: they differ.
    """
    for name, value in checksums.items():
        if name in saved and saved[name] != value:
            raise RuntimeError(
                f"the {name} weights loaded from {source} have checksum {value:016x}, and had {saved[name]:016x} when "
                "they were saved; the file or the machine is at fault: delete the checkpoint to use the one before"
            )


def check_unchanged(checksums: Mapping[str, int], before: Mapping[str, int]) -> None:
    """Check that parts that do not train are as they were.

    Args:
        before: of the same parts when the run started.

    Raises:
        RuntimeError: they differ.
    """
    for name, value in checksums.items():
        if value != before[name]:
            raise RuntimeError(
                f"the {name} weights do not train, but have changed since the run started (checksum {before[name]:016x}"
                f", now {value:016x}): the memory of a device is at fault; take its node out and start again from the "
                "newest checkpoint"
            )


def _is_counted_here(entry: ShardedTensor) -> bool:
    """Return whether this rank counts a tensor for its replica; the last index is that of the replica."""
    index = entry.replica_id
    return not any(index[:-1]) if isinstance(index, tuple) else True
