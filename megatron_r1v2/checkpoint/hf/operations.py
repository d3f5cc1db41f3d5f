"""The operations of the two-way HF table: each knows both directions and the tensor-parallel split.

`to_shard` makes what one tensor-parallel rank holds from the Hugging Face tensors of a parameter; `to_hf` makes those
tensors again from the shards of all ranks, bit for bit. Both are plain arithmetic: no process group, no communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class Operation(Protocol):
    """A way to make one of our parameters from its Hugging Face tensors, and these from it."""

    def to_shard(self, tensors: Sequence[torch.Tensor], *, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """Return what rank `tensor_rank` of `tensor_size` holds.

        Args:
            tensors: the Hugging Face tensors, in the order of the table.
        """
        ...

    def blocks(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the whole parameter as blocks of its rows, from the first to the last: views, no copies."""
        ...

    def to_hf(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the Hugging Face tensors.

        Args:
            shards: those of all tensor-parallel ranks, in rank order.
        """
        ...

    def hf_blocks(self, whole: torch.Tensor) -> tuple[list[torch.Tensor], ...]:
        """Return each Hugging Face tensor as blocks of its rows, from the first to the last: views, no copies.

        Args:
            whole: the parameter as one rank holds it.
        """
        ...


@dataclass(frozen=True)
class Replicated:
    """Every rank holds the whole tensor."""

    def to_shard(self, tensors: Sequence[torch.Tensor], *, tensor_rank: int, tensor_size: int) -> torch.Tensor:  # noqa: ARG002
        """Return the tensor itself."""
        (tensor,) = tensors
        return tensor

    def blocks(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensor itself."""
        return list(tensors)

    def to_hf(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the first rank's copy."""
        return (shards[0],)

    def hf_blocks(self, whole: torch.Tensor) -> tuple[list[torch.Tensor], ...]:
        """Return the tensor itself."""
        return ([whole],)


@dataclass(frozen=True)
class Split:
    """Every rank holds an equal run of units (rows, columns, heads) along one dimension.

    Covers column-parallel layers (`dim` 0), row-parallel ones (`dim` 1), padded heads and the padded vocabulary.
    """

    dim: int
    num_units: int
    """Units of the Hugging Face tensor."""
    unit_size: int = 1
    """Rows or columns of a unit."""
    padded: bool = False
    """Whether units of zeros are appended until the ranks divide them."""

    def to_shard(self, tensors: Sequence[torch.Tensor], *, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """Pad, then cut out this rank's run."""
        (tensor,) = tensors
        size = self.num_units * self.unit_size
        if tensor.shape[self.dim] != size:
            raise ValueError(f"dimension {self.dim} has {tensor.shape[self.dim]} entries, config.json implies {size}")
        padded_size = padded_units(self.num_units, tensor_size) * self.unit_size if self.padded else size
        if padded_size % tensor_size:
            raise ValueError(f"{padded_size} entries cannot be split over parallel.tensor={tensor_size}")
        length = padded_size // tensor_size
        # The last ranks may hold nothing but padding.
        start = min(tensor_rank * length, size)
        shard = tensor.narrow(self.dim, start, min(length, size - start))
        missing = length - shard.shape[self.dim]
        if not missing:
            return shard
        shape = list(shard.shape)
        shape[self.dim] = missing
        return torch.cat([shard, shard.new_zeros(shape)], dim=self.dim)

    def blocks(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensor itself: one rank needs no padding."""
        return [self.to_shard(tensors, tensor_rank=0, tensor_size=1)]

    def to_hf(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Join the runs and cut the padding."""
        whole = shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=self.dim)
        # No copy where nothing was cut, nor where rows were.
        return (whole.narrow(self.dim, 0, self.num_units * self.unit_size).contiguous(),)

    def hf_blocks(self, whole: torch.Tensor) -> tuple[list[torch.Tensor], ...]:
        """Return the tensor itself: one rank needs no padding."""
        return ([whole],)


@dataclass(frozen=True)
class GroupedQKV:
    """Query, key and value rows, stored per key-value group as [its queries; its key; its value].

    `num_groups` equals the number of heads where each head has its own key and value (the vision tower): then the
    layout is [q_h; k_h; v_h] per head. With more ranks than groups a group's rows are cut, as megatron-core has it.
    """

    num_groups: int
    queries_per_group: int
    head_size: int
    padded: bool = False
    """Whether groups of zeros are appended until the ranks divide them."""

    @property
    def _split(self) -> Split:
        if self.padded:
            return Split(0, self.num_groups, (self.queries_per_group + 2) * self.head_size, padded=True)
        return Split(0, self.num_groups * (self.queries_per_group + 2) * self.head_size)

    def to_shard(self, tensors: Sequence[torch.Tensor], *, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """Interleave [q; k; v] by group and cut out this rank's run."""
        joined = torch.cat(self.blocks(tensors))
        return self._split.to_shard([joined], tensor_rank=tensor_rank, tensor_size=tensor_size)

    def blocks(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the queries, the key and the value of each group in turn."""
        heads = (self.queries_per_group, 1, 1)
        for tensor, count in zip(tensors, heads, strict=True):
            rows = self.num_groups * count * self.head_size
            if tensor.shape[0] != rows:
                raise ValueError(f"query, key or value has {tensor.shape[0]} rows, config.json implies {rows}")
        grouped = [
            tensor.reshape(self.num_groups, count * self.head_size, *tensor.shape[1:])
            for tensor, count in zip(tensors, heads, strict=True)
        ]
        return [part[group] for group in range(self.num_groups) for part in grouped]

    def to_hf(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Undo the interleaving of the joined shards."""
        (joined,) = self._split.to_hf(shards)
        return tuple(torch.cat(blocks) for blocks in self.hf_blocks(joined))

    def hf_blocks(self, whole: torch.Tensor) -> tuple[list[torch.Tensor], ...]:
        """Return the queries, the keys and the values, a group at a time."""
        grouped = whole.reshape(self.num_groups, -1, *whole.shape[1:])
        parts = torch.split(grouped, [self.queries_per_group * self.head_size, self.head_size, self.head_size], dim=1)
        return tuple(list(part) for part in parts)


@dataclass(frozen=True)
class JoinedQKV:
    """One tensor of all queries, then all keys, then all values, where `GroupedQKV` has three."""

    grouped: GroupedQKV

    def to_shard(self, tensors: Sequence[torch.Tensor], *, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """Take the three apart, then interleave them."""
        return self.grouped.to_shard(self._parts(tensors), tensor_rank=tensor_rank, tensor_size=tensor_size)

    def blocks(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the queries, the key and the value of each group in turn."""
        return self.grouped.blocks(self._parts(tensors))

    def _parts(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        (joined,) = tensors
        key = self.grouped.num_groups * self.grouped.head_size
        query = key * self.grouped.queries_per_group
        if joined.shape[0] != query + 2 * key:
            raise ValueError(f"the joined qkv has {joined.shape[0]} rows, config.json implies {query + 2 * key}")
        return torch.split(joined, [query, key, key])

    def to_hf(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Undo the interleaving and join the three."""
        return (torch.cat(self.grouped.to_hf(shards)),)

    def hf_blocks(self, whole: torch.Tensor) -> tuple[list[torch.Tensor], ...]:
        """Return the queries, then the keys, then the values, a group at a time."""
        return ([block for blocks in self.grouped.hf_blocks(whole) for block in blocks],)


@dataclass(frozen=True)
class Stacked:
    """Two column-parallel matrices of which each rank holds [its run of the first; its run of the second]."""

    num_rows: int
    """Rows of one matrix."""

    def to_shard(self, tensors: Sequence[torch.Tensor], *, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """Split each matrix alone: a run of the stacked one would give rank 0 nothing but the first."""
        return torch.cat(self._runs(tensors, tensor_rank=tensor_rank, tensor_size=tensor_size))

    def blocks(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the two."""
        return self._runs(tensors, tensor_rank=0, tensor_size=1)

    def _runs(self, tensors: Sequence[torch.Tensor], *, tensor_rank: int, tensor_size: int) -> list[torch.Tensor]:
        split = Split(0, self.num_rows)
        first, second = tensors
        return [split.to_shard([one], tensor_rank=tensor_rank, tensor_size=tensor_size) for one in (first, second)]

    def to_hf(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Join the first halves, and the second halves."""
        if len(shards) == 1:  # views: a conversion of a large model has one shard and no memory to spare
            first, second = shards[0].chunk(2)
            return first, second
        firsts, seconds = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat(firsts), torch.cat(seconds)

    def hf_blocks(self, whole: torch.Tensor) -> tuple[list[torch.Tensor], ...]:
        """Return the two halves."""
        first, second = whole.chunk(2)
        return [first], [second]


def padded_units(num_units: int, tensor_size: int) -> int:
    """Return the smallest multiple of `tensor_size` that is not below `num_units`."""
    return -(-num_units // tensor_size) * tensor_size
