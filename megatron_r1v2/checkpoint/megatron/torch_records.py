"""One tensor in a file of records, as torch.save writes it and torch.load reads it, without a copy of the tensor.

A record is a zip file in the file: `data.pkl` describes the tensor, `data/0` is its storage, uncompressed,
and every member has a CRC-32. torch itself would read the storage into new memory, and go over it twice to write it.
"""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import torch

from megatron_r1v2.checkpoint.megatron.torch_internals import (
    REBUILD_MODULE,
    REBUILD_NAMES,
    STORAGES,
    UNTYPED_DTYPES,
)
from megatron_r1v2.checkpoint.stored_tensors import Block, check_blocks, write_hashed
from megatron_r1v2.checkpoint.tensor_files import TensorInfo, tensor_in

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


class Storage(NamedTuple):
    """The storage of a record's tensor."""

    start: int
    """In the file."""
    num_bytes: int
    member: str
    """Its name in the zip file."""
    crc: int
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def write_record(file: BinaryIO, info: TensorInfo, blocks: Sequence[Block]) -> tuple[int, str]:
    """Append a record to a file.

    Args:
        blocks: its rows, from the first to the last, in one block or several, on the CPU.

    Returns:
        The position of the record, and the digest of the tensor's bytes (`write_hashed`).
    """
    check_blocks("a record", blocks, info)
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


def find_storage(file: BinaryIO, start: int, length: int) -> Storage:
    """Read all of a record but its storage.

    Raises:
        ValueError: the record is damaged, or holds no tensor.
    """
    with naming_record(start):
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
        if member.compress_type != zipfile.ZIP_STORED or begin + member.file_size > start + length:
            raise zipfile.BadZipFile("its storage is compressed or ends beyond it")
        dtype = described.dtype or STORAGES[storage]
        view = described.offset, described.shape, described.stride
        return Storage(begin, member.file_size, member.filename, member.CRC, dtype, *view)


def read_record(file: BinaryIO, start: int, length: int, mapped: memoryview, *, check_crc: bool) -> torch.Tensor:
    """Read a record.

    Args:
        mapped: the whole file, in memory; the tensor lies there, or is a copy where that is not aligned.
        check_crc: whether the CRC-32 of the storage is checked.

    Raises:
        ValueError: the record is damaged, or holds no tensor.
    """
    storage = find_storage(file, start, length)
    data = mapped[storage.start : storage.start + storage.num_bytes]
    with naming_record(start):
        if check_crc:
            check_crc32(storage, zlib.crc32(data))
        numbers = tensor_in(data, storage.dtype, start=storage.start)
        return numbers.as_strided(storage.shape, storage.stride, storage.offset)


class Crc32:
    """A CRC-32 under way, with the interface of hashlib."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: memoryview) -> None:
        """Add bytes."""
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        """Return the checksum of the bytes so far."""
        return f"{self._value:08x}"


def check_crc32(storage: Storage, crc: int) -> None:
    """Compare the CRC-32 of a storage's bytes with that of its record.

    Raises:
        zipfile.BadZipFile: they differ.
    """
    if crc != storage.crc:
        raise zipfile.BadZipFile(f"the checksum of {storage.member} is wrong")


@contextmanager
def naming_record(start: int) -> Iterator[None]:
    """Turn errors into one that says which record is damaged."""
    try:
        yield
    except (zipfile.BadZipFile, NotImplementedError, *UNPICKLING_ERRORS) as error:
        raise ValueError(f"the record at byte {start} is damaged ({str(error)[:200]})") from error


class _Description(NamedTuple):
    """The arguments of torch's own functions that rebuild a tensor."""

    storage: tuple[str, str, str, str, int]
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    hooks: object
    dtype: torch.dtype | None = None
    metadata: object = None


class _DescriptionUnpickler(pickle.Unpickler):
    """An unpickler for `data.pkl`, which may describe a tensor and call nothing."""

    def find_class(self, module: str, name: str) -> object:
        if module == REBUILD_MODULE and name in REBUILD_NAMES:
            return _Description
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch.storage", "UntypedStorage") or (module == "torch" and name in STORAGES):
            return name
        if module == "torch" and name in UNTYPED_DTYPES:
            return UNTYPED_DTYPES[name]
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}, which no tensor needs")

    def persistent_load(self, pid: object) -> object:
        return pid


_StoragePlace = tuple[str, type, str, str, int]
"""Kind, class, name in the archive, device, number of elements."""


class _DescriptionPickler(pickle.Pickler):
    """A pickler of `data.pkl` as torch.save writes it: the tensor, and a name for its storage."""

    def __init__(self, buffer: io.BytesIO, info: TensorInfo) -> None:
        super().__init__(buffer, protocol=2)
        kinds = {dtype: getattr(torch, name) for name, dtype in STORAGES.items()}
        if info.dtype in kinds:
            self._storage: _StoragePlace = ("storage", kinds[info.dtype], "0", "cpu", torch.Size(info.shape).numel())
        else:
            self._storage = ("storage", torch.UntypedStorage, "0", "cpu", info.num_bytes)

    def persistent_id(self, obj: object) -> _StoragePlace | None:
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

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # io passes nothing else
        wanted = min(len(buffer), max(self._end - self._file.tell(), 0))
        content = self._file.read(wanted)
        buffer[: len(content)] = content
        return len(content)

    def write(self, data: bytes) -> int:  # type: ignore[override]  # zipfile passes nothing else
        return self._file.write(data)
