"""The bytes of tensors and files: mapped where they are read, and their digests."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import xxhash

_BLOCK_BYTES = 1024**2
"""So much stays in a core's cache between hashing and writing."""
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of a tensor, known without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Return the size of the numbers."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @property
    def dtype_name(self) -> str:
        """Return torch's name of the dtype, such as bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    def meta(self) -> torch.Tensor:
        """Return a tensor of this shape and dtype without data."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def tensor_info(tensor: torch.Tensor) -> TensorInfo:
    """Return shape and dtype of a tensor."""
    return TensorInfo(tensor.dtype, tuple(tensor.shape))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a CPU tensor, without a copy where it is contiguous."""
    # As bytes: numpy has no bfloat16.
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def mapped_file(path: Path) -> memoryview:
    """Map a file: a byte is read from the disk when it is touched, and what is written there stays in memory."""
    with path.open("rb") as file:
        # torch wants memory that can be written; copy-on-write never reaches the file.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    # Large reads ahead into large pages: without it, reading from the disk takes four times the processor time.
    mapped.madvise(mmap.MADV_SEQUENTIAL)
    return memoryview(mapped)


def tensor_in(data: memoryview, dtype: torch.dtype, *, start: int) -> torch.Tensor:
    """Return the numbers in mapped bytes, in place where they are aligned.

    Args:
        start: offset of the bytes in the mapped file, which is aligned to a page.
    """
    # frombuffer refuses an empty buffer.
    if not data:
        return torch.empty(0, dtype=dtype)
    if start % dtype.itemsize:
        data = torch.frombuffer(data, dtype=torch.uint8).clone().numpy().data
    return torch.frombuffer(data, dtype=dtype)


def byte_pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Return the bytes of a CPU tensor in pieces."""
    data = tensor_bytes(tensor)
    for start in range(0, len(data), _BLOCK_BYTES):
        yield data[start : start + _BLOCK_BYTES]


def digest_of(tensor: torch.Tensor) -> str:
    """Return the XXH3-128 of a CPU tensor's bytes."""
    return xxhash.xxh3_128_hexdigest(tensor_bytes(tensor))


def file_digest(path: Path) -> str:
    """Return the XXH3-128 of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def in_threads(function: Callable[[str], _Result], names: Iterable[str], *, workers: int) -> dict[str, _Result]:
    """Call a function with every name in a few threads, as reading and hashing let go of the interpreter."""
    names = list(names)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        return dict(zip(names, pool.map(function, names), strict=True))
