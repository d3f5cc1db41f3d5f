"""Tensors that lie in files, and the runs of bytes that make another tensor of them without holding either.

Conversions rearrange rows. The views that an operation of the table takes of tensors without data say which bytes
follow which; those are then read, hashed and written through buffers of a few MiB.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy
import torch
import xxhash

from megatron_r1v2.checkpoint.direct_io import DirectReader
from megatron_r1v2.checkpoint.tensor_files import TensorInfo, byte_pieces, tensor_info


class Hasher(Protocol):
    """A checksum under way."""

    def update(self, data: memoryview) -> None:
        """Add bytes."""
        ...

    def hexdigest(self) -> str:
        """Return the checksum of the bytes so far."""
        ...


@dataclass(frozen=True)
class Checksum:
    """The checksum that a stored tensor is compared with."""

    begin: Callable[[], Hasher]
    compare: Callable[[str], None]
    """Takes the hexadecimal digest; raises ValueError where it is another."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose numbers lie one after the other in a file."""

    path: Path
    start: int
    info: TensorInfo
    checksum: Checksum | None = None

    def read(self, reader: DirectReader) -> torch.Tensor:
        """Read the whole tensor into memory.

        Raises:
            ValueError: it is damaged.
        """
        content = torch.empty(self.info.num_bytes, dtype=torch.uint8)
        filled, position = content.numpy(), 0
        for data in self.run(reader, 0, self.info.num_bytes, _Comparison.of(self)).pieces():
            numpy.copyto(filled[position : position + len(data)], numpy.frombuffer(data, numpy.uint8))
            position += len(data)
        return content.view(self.info.dtype).view(self.info.shape)

    def run(self, reader: DirectReader, start: int, nbytes: int, comparison: _Comparison | None) -> FileRun:
        """Return a run of its bytes."""
        return FileRun(reader, self.path, self.start + start, nbytes, self.info.dtype, comparison)


@dataclass(frozen=True)
class FileRun:
    """A run of bytes in a file."""

    reader: DirectReader
    path: Path
    start: int
    nbytes: int
    dtype: torch.dtype
    comparison: _Comparison | None

    def pieces(self) -> Iterator[memoryview]:
        """Read the run in pieces, each valid until the next is asked for.

        Raises:
            ValueError: the tensor that ends with this run is damaged.
        """
        for data in self.reader.read(self.path, self.start, self.nbytes):
            if self.comparison is not None:
                self.comparison.update(data)
            yield data


Block = torch.Tensor | FileRun
"""Some rows of a tensor: in memory, or in a file."""


def check_blocks(name: str, blocks: Sequence[Block], info: TensorInfo) -> None:
    """Refuse blocks that do not make a tensor of the size and dtype that was announced."""
    if {block.dtype for block in blocks} != {info.dtype} or sum(block.nbytes for block in blocks) != info.num_bytes:
        found = [tensor_info(block) if isinstance(block, torch.Tensor) else block for block in blocks]
        raise ValueError(f"{name} came out as {found} where {info} was announced")


def write_hashed(write: Callable[[memoryview], object], blocks: Iterable[Block]) -> str:
    """Write the bytes of blocks one after the other, and return the XXH3-128 of them all."""
    digest = xxhash.xxh3_128()
    for block in blocks:
        for piece in byte_pieces(block) if isinstance(block, torch.Tensor) else block.pieces():
            digest.update(piece)
            write(piece)
    return digest.hexdigest()


class _Comparison:
    """The checksum of a stored tensor whose runs are read in order, compared after the last."""

    def __init__(self, num_bytes: int, checksum: Checksum) -> None:
        self._left, self._hasher, self._compare = num_bytes, checksum.begin(), checksum.compare

    @classmethod
    def of(cls, stored: StoredTensor) -> _Comparison | None:
        return cls(stored.info.num_bytes, stored.checksum) if stored.checksum is not None else None

    def update(self, data: memoryview) -> None:
        self._hasher.update(data)
        self._left -= len(data)
        if not self._left:
            self._compare(self._hasher.hexdigest())


def rearranged(
    stored: Sequence[StoredTensor],
    reader: DirectReader,
    arrange: Callable[[Sequence[torch.Tensor]], Sequence[Sequence[torch.Tensor]]],
) -> list[list[Block]]:
    """Return the blocks of tensors that are made of stored ones, as runs of the files wherever that is possible.

    Args:
        stored: all of one dtype.
        arrange: returns views of the tensors it is given: for each tensor to make, the blocks of its rows.
    """
    # End to end in one array without data, so that the offset of a view says which tensor it is of.
    ends = list(accumulate(torch.Size(one.info.shape).numel() for one in stored))
    whole = torch.empty(ends[-1], dtype=stored[0].info.dtype, device="meta")
    starts = [0, *ends[:-1]]
    parts = [whole[start:end].view(one.info.shape) for one, start, end in zip(stored, starts, ends, strict=True)]
    made = arrange(parts)
    views = [view for blocks in made for view in blocks]
    size = whole.dtype.itemsize
    found = [(bisect_right(starts, view.storage_offset()) - 1, view) for view in views]
    places = [(number, int(view.storage_offset() - starts[number]) * size, view.nbytes) for number, view in found]
    checked = any(one.checksum is not None for one in stored)
    if not all(view.is_contiguous() for view in views) or (checked and not _in_order(places, stored)):
        # A checksum is of all bytes in their order: such tensors (query, key and value) are small enough to be held.
        return [list(blocks) for blocks in arrange([one.read(reader) for one in stored])]
    comparisons = [_Comparison.of(one) for one in stored]
    runs = (stored[number].run(reader, start, length, comparisons[number]) for number, start, length in places)
    return [[next(runs) for _ in blocks] for blocks in made]


def _in_order(places: Sequence[tuple[int, int, int]], stored: Sequence[StoredTensor]) -> bool:
    """Return whether each stored tensor is read from its first byte to its last."""
    reached = [0] * len(stored)
    for number, start, length in places:
        if start != reached[number]:
            return False
        reached[number] += length
    return reached == [one.info.num_bytes for one in stored]
