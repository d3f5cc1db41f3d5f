"""One tensor in a file of records: what torch.save writes and torch.load reads, without a copy of the tensor.

A record is a zip file in the file: `data.pkl` says what the tensor looks like, `data/0` is its storage, uncompressed,
and every member has a CRC-32. torch itself would read the storage into new memory, and go over it twice to write it.
"""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import torch

from megatron_r1v2.checkpoint.hf.safetensors_files import TensorInfo, tensor_info
from megatron_r1v2.checkpoint.tensor_files import tensor_in, write_hashed

# A damaged pickle or zip can raise any of these, and pickle's documentation promises no shorter list.
UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    SystemError,
    TypeError,
    ValueError,
)
_ALIGNMENT = 64
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_UNTYPED = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
"""What torch keeps in a storage without a type; the tensor itself names it."""


def write_record(file: BinaryIO, info: TensorInfo, blocks: Sequence[torch.Tensor]) -> tuple[int, str]:
    """Append a record to a file.

    Args:
        file: open for writing.
        info: shape and dtype of the tensor.
        blocks: its rows, from the first to the last, in one tensor or several, on the CPU.

    Returns:
        Where the record begins, and the digest of the tensor's bytes (`write_hashed`).
    """
    if {block.dtype for block in blocks} != {info.dtype} or sum(block.nbytes for block in blocks) != info.num_bytes:
        raise ValueError(f"blocks came out as {[tensor_info(block) for block in blocks]} where {info} was announced")
    file.write(bytes(-file.tell() % _ALIGNMENT))
    start = file.tell()
    window = _Window(file, start)
    with zipfile.ZipFile(window, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), _description(info))
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), sys.byteorder)
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")
        member = zipfile.ZipInfo("archive/data/0")
        # Readers map the storage where it lies. 4 bytes begin an extra field, 30 and 20 are the fixed headers.
        header = 30 + 20 + len(member.filename) + 4
        padding = -(window.tell() + header) % _ALIGNMENT
        member.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
        with archive.open(member, "w", force_zip64=True) as storage:
            digest = write_hashed(storage.write, blocks)
    return start, digest


def read_record(file: BinaryIO, start: int, length: int, mapped: memoryview, *, check_crc: bool) -> torch.Tensor:
    """Read a record.

    Args:
        file: open for reading.
        start: where the record is in the file.
        length: of it.
        mapped: the whole file, in memory; the tensor lies there, or is a copy where that is not aligned.
        check_crc: whether the CRC-32 of the storage is checked.

    Raises:
        ValueError: it is damaged, or no tensor.
    """
    try:
        with zipfile.ZipFile(_Window(file, start, length)) as archive:
            root = archive.infolist()[0].filename.split("/")[0]
            described = _Description(*_DescriptionUnpickler(io.BytesIO(archive.read(f"{root}/data.pkl"))).load())
            _, storage, key, _, _ = described.storage
            if archive.read(f"{root}/byteorder") != sys.byteorder.encode():
                raise zipfile.BadZipFile("it is from a machine of another byte order")
            member = archive.getinfo(f"{root}/data/{key}")
            # Opening it compares the two headers of the member.
            archive.open(member).close()
            file.seek(start + member.header_offset + 26)
            names = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
        begin = start + member.header_offset + 30 + names
        data = mapped[begin : begin + member.file_size]
        if member.compress_type != zipfile.ZIP_STORED or begin + len(data) > start + length:
            raise zipfile.BadZipFile("its storage is compressed or ends beyond it")
        if check_crc and zlib.crc32(data) != member.CRC:
            raise zipfile.BadZipFile(f"the checksum of {member.filename} is wrong")
        dtype = described.dtype or _STORAGES[storage]
        numbers = tensor_in(data, dtype, start=begin)
        return numbers.as_strided(described.shape, described.stride, described.offset)
    except (zipfile.BadZipFile, NotImplementedError, *UNPICKLING_ERRORS) as error:
        raise ValueError(f"the record at byte {start} is damaged ({str(error)[:200]})") from error


class _Description(NamedTuple):
    """What a tensor is rebuilt from: the arguments of torch's own functions for it."""

    storage: tuple[str, str, str, str, int]
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    hooks: Any
    dtype: torch.dtype | None = None
    metadata: Any = None


class _DescriptionUnpickler(pickle.Unpickler):
    """Reads `data.pkl`, which may describe a tensor and call nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return _Description
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch.storage", "UntypedStorage") or (module == "torch" and name in _STORAGES):
            return name
        if module == "torch" and name in _UNTYPED:
            return _UNTYPED[name]
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}, which no tensor needs")

    def persistent_load(self, pid: Any) -> Any:
        return pid


class _DescriptionPickler(pickle.Pickler):
    """Writes `data.pkl` as torch.save does: the tensor, and a name for its storage."""

    def __init__(self, buffer: io.BytesIO, info: TensorInfo) -> None:
        super().__init__(buffer, protocol=2)
        kinds = {dtype: getattr(torch, name) for name, dtype in _STORAGES.items()}
        if info.dtype in kinds:
            self._storage: Any = ("storage", kinds[info.dtype], "0", "cpu", torch.Size(info.shape).numel())
        else:
            self._storage = ("storage", torch.UntypedStorage, "0", "cpu", info.num_bytes)

    def persistent_id(self, obj: Any) -> Any:
        return self._storage if isinstance(obj, (torch.TypedStorage, torch.UntypedStorage)) else None


def _description(info: TensorInfo) -> bytes:
    buffer = io.BytesIO()
    # Its memory is never touched, hence never given by the system.
    _DescriptionPickler(buffer, info).dump(torch.empty(info.shape, dtype=info.dtype))
    return buffer.getvalue()


class _Window(io.RawIOBase):
    """A part of a file as a file: from a position on, up to a length or as far as is written."""

    def __init__(self, file: BinaryIO, start: int, length: int = 0) -> None:
        self._file, self._start, self._end = file, start, start + length
        self.seek(0)

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: self._start, io.SEEK_CUR: self._file.tell(), io.SEEK_END: self._end}[whence]
        return self._file.seek(max(base + offset, self._start)) - self._start

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(self._end - self._file.tell(), 0))
        content = self._file.read(wanted)
        buffer[: len(content)] = content
        return len(content)

    def write(self, data: Any) -> int:
        return self._file.write(data)
