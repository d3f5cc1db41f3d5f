"""The bytes of tensors in files: mapped where they are read, hashed as they are written, on disk at the end."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash

DIGEST = "xxh3_128"
"""It finds damage as surely as SHA-256 and costs a tenth of it; only against forgery it is of no use."""
_BLOCK_BYTES = 1024**2
"""What stays in a core's cache between hashing and writing."""


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a CPU tensor, without a copy where it is contiguous."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def mapped_file(path: Path) -> memoryview:
    """Return a file's bytes, each read from the disk when it is touched; what is written there stays in memory."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    # Large reads ahead into large pages: without it, reading from the disk takes four times the processor time.
    mapped.madvise(mmap.MADV_SEQUENTIAL)
    return memoryview(mapped)


def tensor_in(data: memoryview, dtype: torch.dtype, *, start: int) -> torch.Tensor:
    """Return the numbers in bytes, in place where they are aligned.

    Args:
        data: the bytes.
        dtype: of the numbers.
        start: where the bytes begin in the mapped file.
    """
    if not data:
        return torch.empty(0, dtype=dtype)
    if start % dtype.itemsize:
        data = torch.frombuffer(data, dtype=torch.uint8).clone().numpy().data
    return torch.frombuffer(data, dtype=dtype)


def digest_of(tensor: torch.Tensor) -> str:
    """Return the XXH3-128 of a CPU tensor's bytes."""
    return xxhash.xxh3_128_hexdigest(tensor_bytes(tensor))


def write_hashed(write: Callable[[memoryview], Any], parts: Iterable[torch.Tensor]) -> str:
    """Write the bytes of tensors, one after the other.

    Args:
        write: takes bytes, all of them.
        parts: the tensors, on the CPU.

    Returns:
        The XXH3-128 of all.
    """
    digest = xxhash.xxh3_128()
    for part in parts:
        data = tensor_bytes(part)
        for start in range(0, len(data), _BLOCK_BYTES):
            block = data[start : start + _BLOCK_BYTES]
            digest.update(block)
            write(block)
    return digest.hexdigest()


@contextmanager
def file_on_disk(path: Path) -> Iterator[BinaryIO]:
    """Open a new file for writing; when the block ends well, it is on disk (fsync)."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
