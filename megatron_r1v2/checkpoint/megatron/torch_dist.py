"""The torch_dist format of megatron-core, read and written one tensor at a time, without a process group or a model.

A folder of it holds `metadata.json` and `common.pt`, `.metadata` (where every part of every array is) and files of
records, each a tensor as torch.save writes it.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_r1v2.checkpoint.direct_io import direct_file
from megatron_r1v2.checkpoint.megatron.parameter_names import DistEntry
from megatron_r1v2.checkpoint.megatron.torch_internals import METADATA_NAMES, StorageInfo
from megatron_r1v2.checkpoint.megatron.torch_records import (
    UNPICKLING_ERRORS,
    Crc32,
    check_crc32,
    find_storage,
    naming_record,
    read_record,
    write_record,
)
from megatron_r1v2.checkpoint.stored_tensors import Block, Checksum, StoredTensor
from megatron_r1v2.checkpoint.tensor_files import TensorInfo, mapped_file
from megatron_r1v2.resilience.files import write_file

METADATA = ".metadata"
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON = {"common_backend": "torch", "common_backend_version": 1}


@dataclass(frozen=True)
class Record:
    """The place of a written parameter."""

    file: str
    offset: int
    length: int


class TorchDist:
    """The arrays of a torch_dist folder, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the metadata of the folder, but no tensor.

        Raises:
            ValueError: the folder is of another format, its metadata is damaged or names what it must not.
        """
        self.folder = folder
        self._arrays: dict[str, TensorInfo] = {}
        self._chunks: dict[str, list[tuple[ChunkStorageMetadata, StorageInfo]]] = {}
        self._mapped: dict[Path, memoryview] = {}
        try:
            stated = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
            metadata = _load_metadata(folder / METADATA)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} is no torch_dist checkpoint, or is damaged: {error}") from error
        if not isinstance(stated, dict) or stated.get("sharded_backend") != "torch_dist":
            raise ValueError(f"{folder} has the format {stated!r}; accepted: torch_dist")
        try:
            self._index(metadata)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / METADATA} is damaged: {error!r}") from error

    def array_names(self) -> list[str]:
        """Return the names of the arrays, sorted."""
        return sorted(self._arrays)

    def array(self, key: str) -> TensorInfo:
        """Return the shape and dtype of a whole array."""
        if key not in self._arrays:
            raise ValueError(f"{self.folder} has no {key!r}; was it made from another model?")
        return self._arrays[key]

    def num_chunks(self, key: str) -> int:
        """Return the number of parts that an array lies in."""
        return len(self._chunks[key])

    def info(self, entry: DistEntry) -> TensorInfo:
        """Return shape and dtype of a parameter.

        Raises:
            ValueError: it is not there, or its array has another number of layers.
        """
        array = self.array(entry.key)
        if entry.layer is None:
            return array
        if not array.shape or array.shape[0] != entry.num_layers:
            raise ValueError(
                f"{self.folder}: {entry.key} is {list(array.shape)}, but the model has {entry.num_layers} layers"
            )
        return TensorInfo(array.dtype, array.shape[1:])

    def read(self, entry: DistEntry, *, check_crc: bool = True) -> torch.Tensor:
        """Read one parameter, put together from its parts.

        Args:
            check_crc: whether the CRC-32 of each record is checked; not needed where a digest is.

        Raises:
            ValueError: a part is missing, or its record is damaged.
        """
        info, layer = self.info(entry), entry.layer
        found: list[tuple[Sequence[int], Sequence[int], torch.Tensor]] = []
        for chunk, storage in self._chunks[entry.key]:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if layer is not None and not offsets[0] <= layer < offsets[0] + sizes[0]:
                continue
            tensor = self._record(storage, check_crc=check_crc)
            if tuple(tensor.shape) != sizes or tensor.dtype != info.dtype:
                raise ValueError(
                    f"{self.folder / storage.relative_path}: a part of {entry.key} is {tensor.dtype} "
                    f"{list(tensor.shape)} where {info.dtype} {list(sizes)} is announced"
                )
            if layer is not None:
                tensor, offsets, sizes = tensor[layer - offsets[0]], offsets[1:], sizes[1:]
            found.append((offsets, sizes, tensor))
        if len(found) == 1 and found[0][1] == info.shape:
            return found[0][2]
        return _joined(found, info, f"{self.folder}: {entry.key}")

    def stored(self, entry: DistEntry) -> StoredTensor | None:
        """Return the place of a parameter that lies whole in one record, with its CRC-32; None: it does not.

        Raises:
            ValueError: its record is damaged.
        """
        info, chunks = self.info(entry), self._chunks[entry.key]
        if entry.layer is not None:
            chunks = [(chunk, where) for chunk, where in chunks if tuple(chunk.sizes) == (1, *info.shape)]
            chunks = [(chunk, where) for chunk, where in chunks if chunk.offsets[0] == entry.layer]
        if len(chunks) != 1:
            return None
        where = chunks[0][1]
        path = self.folder / where.relative_path
        with path.open("rb") as file, _naming(path):
            storage = find_storage(file, where.offset, where.length)
        stacked = info.shape if entry.layer is None else (1, *info.shape)
        plain = TensorInfo(storage.dtype, tuple(storage.shape)).meta()
        lies_plain = (storage.offset, storage.stride) == (0, plain.stride()) and storage.num_bytes == info.num_bytes
        if not lies_plain or (storage.dtype, tuple(storage.shape)) != (info.dtype, stacked):
            return None

        def compare(digest: str) -> None:
            with _naming(path), naming_record(where.offset):
                check_crc32(storage, int(digest, 16))

        return StoredTensor(path, storage.start, info, Checksum(Crc32, compare))

    def _index(self, metadata: Metadata) -> None:
        storage = {(index.fqn, tuple(index.offset or ())): where for index, where in metadata.storage_data.items()}
        sizes = {path.name: path.stat().st_size for path in self.folder.iterdir() if path.is_file()}
        for key, array in metadata.state_dict_metadata.items():
            if not isinstance(array, TensorStorageMetadata):
                continue
            self._arrays[key] = TensorInfo(array.properties.dtype, tuple(array.size))
            chunks = []
            for chunk in array.chunks:
                where = storage.get((key, tuple(chunk.offsets)))
                if where is None:
                    raise ValueError(f"{self.folder / METADATA} does not say where a part of {key} is; it is damaged")
                name, end = where.relative_path, where.offset + where.length
                # With a path in it, a name could lead to any file of the machine.
                if Path(name).name != name:
                    raise ValueError(f"{self.folder / METADATA} names the file {name!r}; accepted: files beside it")
                if name not in sizes:
                    raise ValueError(f"{self.folder / name} is missing; copy the checkpoint again, with all its files")
                if not 0 <= where.offset < end <= sizes[name]:
                    raise ValueError(
                        f"{self.folder / name} has {sizes[name]} bytes, but a part of {key} ends at byte {end}: the "
                        "file is truncated, copy it again"
                    )
                chunks.append((chunk, where))
            self._chunks[key] = chunks

    def _record(self, storage: StorageInfo, *, check_crc: bool) -> torch.Tensor:
        path = self.folder / storage.relative_path
        if path not in self._mapped:
            self._mapped[path] = mapped_file(path)
        with path.open("rb") as file, _naming(path):
            return read_record(file, storage.offset, storage.length, self._mapped[path], check_crc=check_crc)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}; copy it again") from error


def write_records(
    path: Path,
    parameters: Sequence[tuple[DistEntry, TensorInfo]],
    read: Iterable[Sequence[Block]],
    *,
    wrote: Callable[[int], None] = lambda _: None,
) -> list[tuple[Record, str]]:
    """Write a file of records, holding one tensor at a time, or none.

    Args:
        parameters: place, shape and dtype of each tensor.
        read: the tensors in the same order, each as blocks of its rows.
        wrote: called with the number of bytes after each tensor.

    Returns:
        The record of each tensor, and its digest (`write_hashed`). The file is on disk when this returns.
    """
    records = []
    with direct_file(path) as file:
        for (entry, info), blocks in zip(parameters, read, strict=True):
            # A layer is a run of one of its stacked array, which has the layers in front.
            stored = info if entry.layer is None else TensorInfo(info.dtype, (1, *info.shape))
            start, digest = write_record(file, stored, blocks)
            records.append((Record(path.name, start, file.tell() - start), digest))
            wrote(info.num_bytes)
    return records


def read_records(path: Path, records: Iterable[Record]) -> Iterator[torch.Tensor]:
    """Read tensors that `write_records` wrote, with the checks that a record allows.

    Raises:
        ValueError: a record is damaged.
    """
    mapped = mapped_file(path)
    with path.open("rb") as file:
        for record in records:
            yield read_record(file, record.offset, record.length, mapped, check_crc=True)


def write_index(folder: Path, parameters: Iterable[tuple[DistEntry, TensorInfo, Record]]) -> None:
    """Write the index of a torch_dist folder whose files of records are finished."""
    arrays: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, StorageInfo] = {}
    files: dict[str, str] = {}  # one object a name: a pickle keeps objects apart, and the bytes must not vary
    for entry, info, record in parameters:
        stacked = entry.layer is not None
        size = torch.Size((entry.num_layers, *info.shape) if stacked else info.shape)
        offsets = torch.Size((entry.layer or 0, *([0] * len(info.shape))) if stacked else [0] * len(info.shape))
        sizes = torch.Size((1, *info.shape) if stacked else info.shape)
        if entry.key not in arrays:
            arrays[entry.key] = TensorStorageMetadata(
                properties=TensorProperties(dtype=info.dtype), size=size, chunks=[]
            )
        arrays[entry.key].chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=sizes))
        storage[MetadataIndex(entry.key, offsets)] = StorageInfo(
            files.setdefault(record.file, record.file), record.offset, record.length
        )
    metadata = Metadata(state_dict_metadata=dict(arrays), storage_data=storage)
    write_file(folder / METADATA, pickle.dumps(metadata))
    # Empty, as every entry is a tensor; megatron-core does not load a checkpoint without the file.
    torch.save({}, folder / "common.pt")
    # Last: a folder with this file counts as a checkpoint.
    write_file(folder / "metadata.json", json.dumps({**_FORMAT, **_COMMON}))


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler for `.metadata` that calls nothing but descriptions of tensors."""

    def find_class(self, module: str, name: str) -> object:
        if name not in METADATA_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}, which no checkpoint's metadata needs")
        return super().find_class(module, name)


def _load_metadata(path: Path) -> Metadata:
    with path.open("rb") as file:
        try:
            metadata = _MetadataUnpickler(file).load()
        except UNPICKLING_ERRORS as error:
            raise ValueError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path.name} holds a {type(metadata).__name__}")
    return metadata


def _joined(
    parts: Sequence[tuple[Sequence[int], Sequence[int], torch.Tensor]], info: TensorInfo, what: str
) -> torch.Tensor:
    whole = torch.empty(info.shape, dtype=info.dtype)
    covered = 0
    for number, (offsets, sizes, tensor) in enumerate(parts):
        ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
        if any(end > limit for end, limit in zip(ends, info.shape, strict=True)):
            raise ValueError(f"{what}: a part reaches beyond the array; the checkpoint's metadata is damaged")
        # The count below alone would not see a hole beside an overlap of its size.
        for other_offsets, other_sizes, _ in parts[:number]:
            if all(
                start < other + length and other < end
                for start, end, other, length in zip(offsets, ends, other_offsets, other_sizes, strict=True)
            ):
                raise ValueError(f"{what}: two parts overlap; the checkpoint's metadata is damaged")
        whole[tuple(slice(start, end) for start, end in zip(offsets, ends, strict=True))] = tensor
        covered += tensor.numel()
    if covered != whole.numel():
        raise ValueError(f"{what}: parts are missing ({covered} of {whole.numel()} numbers are there)")
    return whole
