"""One safetensors file: its header read and checked by the `safetensors` library, its tensors mapped or streamed.

A file is eight bytes that say how long the header is, a JSON header, and the tensors one after the other. The library
refuses headers that do not fit the file byte for byte; reading and writing the tensors is ours, because conversions
keep no more than one tensor in memory, most often none, and need its digest.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_r1v2.checkpoint.direct_io import direct_file
from megatron_r1v2.checkpoint.stored_tensors import Block, StoredTensor, check_blocks, write_hashed
from megatron_r1v2.checkpoint.tensor_files import TensorInfo, mapped_file, tensor_in

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


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Return the place of each tensor of a file, by name, in the order of the file.

    Raises:
        ValueError: the library refuses the file, or a tensor has a dtype or a shape that no model has.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            slices = [(name, opened.get_slice(name)) for name in opened.offset_keys()]
            infos = [(name, _info(name, found.get_dtype(), found.get_shape())) for name, found in slices]
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as safetensors: {error}; it is truncated or "
            "something else, copy it again"
        ) from error
    # The library does not give offsets. It has checked that the tensors fill the file from the header to its end.
    start = path.stat().st_size - sum(info.num_bytes for _, info in infos)
    stored = {}
    for name, info in infos:
        stored[name] = StoredTensor(path, start, info)
        start += info.num_bytes
    return stored


def map_safetensors_file(path: Path) -> dict[str, torch.Tensor]:
    """Open a safetensors file and return its tensors by name, each read from the disk when it is touched.

    Raises:
        ValueError: see `read_safetensors_header`.
    """
    return map_tensors(path, read_safetensors_header(path))


def map_tensors(path: Path, stored: Mapping[str, StoredTensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a file whose header was read."""
    mapped, tensors = mapped_file(path), {}
    for name, place in stored.items():
        data = mapped[place.start : place.start + place.info.num_bytes]
        tensors[name] = tensor_in(data, place.info.dtype, start=place.start).view(place.info.shape)
    return tensors


def write_safetensors_file(
    path: Path,
    tensors: Sequence[tuple[str, TensorInfo]],
    read: Iterable[Sequence[Block]],
    *,
    wrote: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:
    """Write a file whose tensors are made one after the other: no more than one of them is in memory, or none.

    Args:
        tensors: name, shape and dtype of each, known beforehand.
        read: the tensors in the same order, each as blocks of its rows, on the CPU.
        wrote: called with the number of bytes after each tensor.

    Returns:
        The digest of each tensor's bytes (`write_hashed`), by name. The file is on disk when this returns.

    Raises:
        ValueError: a tensor comes out in another size or dtype than announced.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors:
        end = offset + info.num_bytes
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    # The tensors then begin at a multiple of their item size, and can be used where they are mapped.
    raw += b" " * (-len(raw) % 8)
    digests = {}
    with direct_file(path) as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for (name, info), blocks in zip(tensors, read, strict=True):
            check_blocks(name, blocks, info)
            digests[name] = write_hashed(file.write, blocks)
            wrote(info.num_bytes)
    return digests


def _info(name: str, dtype: str, shape: Sequence[int]) -> TensorInfo:
    if dtype not in _DTYPES:
        raise ValueError(f"{name!r} has the dtype {dtype}; accepted: {', '.join(_DTYPES)}")
    # The library multiplies a size of zero away: torch would then overflow on the other dimensions.
    if math.prod(size or 1 for size in shape) >= 2**63:
        raise ValueError(f"{name!r} has the shape {list(shape)}, beyond what any machine counts")
    return TensorInfo(_DTYPES[dtype], tuple(shape))
