"""One safetensors file: its header read as if somebody hostile had written it, and the file written as tensors come.

A file is eight bytes that say how long the header is, a JSON header that says where each tensor is, and the tensors.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_r1v2.checkpoint.tensor_files import file_on_disk, mapped_file, tensor_in, write_hashed

_MAX_HEADER_BYTES = 100 * 1000**2
"""Of the format itself; a header of the 38B model has 0.2 MB."""
_WORD = 2**63
_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Return its size."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def meta(self) -> torch.Tensor:
        """Return a tensor of this shape and dtype without data."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def tensor_info(tensor: torch.Tensor) -> TensorInfo:
    """Return shape and dtype of a tensor."""
    return TensorInfo(tensor.dtype, tuple(tensor.shape))


def map_safetensors_file(path: Path) -> dict[str, torch.Tensor]:
    """Open a safetensors file after checking its header: what it says must fit the file byte for byte.

    Args:
        path: of the file.

    Returns:
        The tensors by name, each read from the disk when it is touched.

    Raises:
        ValueError: the header is too long, no JSON, has a name twice, or its tensors overlap, leave gaps, reach out of
            the file or have not the size that shape and dtype say.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise _broken(path, size, f"its first eight bytes announce a header of {length} bytes")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
        if not isinstance(header, dict):
            raise ValueError("the header is no JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ is no object of strings")
        _check_offsets(header, size - 8 - length)
    except (ValueError, RecursionError) as error:
        raise _broken(path, size, str(error)) from error
    mapped, tensors = mapped_file(path), {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = tensor_in(mapped[start:end], _DTYPES[entry["dtype"]], start=start).view(entry["shape"])
    return tensors


def write_safetensors_file(
    path: Path,
    tensors: Sequence[tuple[str, TensorInfo]],
    read: Iterable[torch.Tensor],
    *,
    wrote: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:
    """Write a file whose tensors are made one after the other: no more than one of them is in memory.

    Args:
        path: of the file to make.
        tensors: name, shape and dtype of each, known beforehand.
        read: the tensors in the same order, on the CPU.
        wrote: told how many bytes were written, after each tensor.

    Returns:
        The digest of each tensor's bytes (`write_hashed`), by name. The file is on disk when this returns.

    Raises:
        ValueError: a tensor comes out in another shape or dtype than announced.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors:
        end = offset + info.num_bytes
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    digests = {}
    with file_on_disk(path) as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for (name, info), tensor in zip(tensors, read, strict=True):
            if tensor_info(tensor) != info:
                raise ValueError(f"{name} came out as {tensor_info(tensor)} where {info} was announced")
            digests[name] = write_hashed(file.write, [tensor])
            wrote(info.num_bytes)
    return digests


def _check_offsets(header: Mapping[str, Any], data_bytes: int) -> None:
    spans = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or str(entry.get("dtype")) not in _DTYPES:
            raise ValueError(f"{name!r} has no known dtype: {str(entry)[:80]}")
        shape: Any = entry.get("shape")
        offsets: Any = entry.get("data_offsets")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"{name!r} has no valid shape and data_offsets: {str(entry)[:80]}")
        size = _DTYPES[entry["dtype"]].itemsize
        for dimension in shape:
            size *= dimension  # Python's integers: a product that would overflow a machine word stays what it is
        if offsets[1] - offsets[0] != size:
            raise ValueError(f"{name!r} has {offsets[1] - offsets[0]} bytes where shape and dtype make {size}")
        if math.prod(dimension or 1 for dimension in shape) >= _WORD:
            raise ValueError(f"{name!r} has the shape {shape}, beyond what any machine counts")
        spans.append((offsets[0], offsets[1], name))
    position = 0
    for start, end, name in sorted(spans):
        if start != position:
            raise ValueError(f"{name!r} begins at byte {start} where {position} was expected: an overlap or a gap")
        position = end
    if position != data_bytes:
        raise ValueError(f"its tensors end at byte {position} of {data_bytes}")


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is in the header twice")
    return content


def _broken(path: Path, size: int, why: str) -> ValueError:
    return ValueError(
        f"{path} ({size} bytes) cannot be read as safetensors: {why}; it is truncated or something else, copy it again"
    )
