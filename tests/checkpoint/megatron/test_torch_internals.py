"""The private names of torch that checkpoints depend on: a release that changes one fails here."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_r1v2.checkpoint.megatron import torch_internals
from megatron_r1v2.checkpoint.megatron.torch_internals import (
    METADATA_NAMES,
    REBUILD_MODULE,
    REBUILD_NAMES,
    STORAGES,
    UNTYPED_DTYPES,
    StorageInfo,
)


def globals_of(pickled: bytes) -> set[tuple[str, str]]:
    """The names that a pickle of torch.save (protocol 2) wants to import."""
    return {tuple(str(arg).split(" ")) for opcode, arg, _ in pickletools.genops(pickled) if opcode.name == "GLOBAL"}


class Recorder(pickle.Unpickler):
    """An unpickler that notes every imported name."""

    names: ClassVar[set[tuple[str, str]]] = set()

    def find_class(self, module, name):
        self.names.add((module, name))
        return super().find_class(module, name)


@pytest.mark.parametrize("module", sorted(METADATA_NAMES))
def test_every_name_exists_in_torch(module):
    there = vars(importlib.import_module(module))
    assert METADATA_NAMES[module] <= set(there)


def test_what_torch_itself_saves_names_nothing_else(tmp_path):
    tensors = {f"a{n}": torch.zeros(2, dtype=dtype) for n, dtype in enumerate(STORAGES.values())}
    save({**tensors, "object": [1]}, storage_writer=FileSystemWriter(str(tmp_path)), no_dist=True)
    with (tmp_path / ".metadata").open("rb") as file:
        metadata = Recorder(file).load()
    assert len(Recorder.names) > 5
    # FileSystemWriter notes the Path that it writes to, which megatron-core gives as a text.
    names = Recorder.names - {(type(tmp_path).__module__, "PosixPath"), ("pathlib", "PosixPath")}
    assert [name for name in names if name[1] not in METADATA_NAMES.get(name[0], ())] == []
    assert isinstance(metadata, Metadata)
    assert all(isinstance(place, StorageInfo) for place in metadata.storage_data.values())
    assert all(isinstance(index, MetadataIndex) for index in metadata.storage_data)


def test_a_place_is_a_file_an_offset_and_a_length():
    fields = [field.name for field in dataclasses.fields(StorageInfo)]
    assert fields[:3] == ["relative_path", "offset", "length"]
    assert StorageInfo("__0_0.distcp", 1, 2) == StorageInfo(relative_path="__0_0.distcp", offset=1, length=2)


def test_tensors_are_rebuilt_from_the_same_arguments():
    module = importlib.import_module(REBUILD_MODULE)
    common = ["storage", "storage_offset", "size", "stride", "requires_grad", "backward_hooks"]
    for name, last in zip(REBUILD_NAMES, (["metadata"], ["dtype", "metadata"]), strict=True):
        assert list(inspect.signature(getattr(module, name)).parameters) == common + last


@pytest.mark.parametrize("dtype", [*STORAGES.values(), *UNTYPED_DTYPES.values()])
def test_torch_save_names_a_tensor_as_the_tables_say(dtype):
    file = io.BytesIO()
    torch.save(torch.zeros(2, dtype=dtype), file)
    with zipfile.ZipFile(file) as archive:
        names = globals_of(archive.read(archive.namelist()[0]))
    assert names - {("collections", "OrderedDict")} == wanted(dtype)


def wanted(dtype: torch.dtype) -> set[tuple[str, str]]:
    for name, stored in STORAGES.items():
        if stored == dtype:
            return {(REBUILD_MODULE, REBUILD_NAMES[0]), ("torch", name)}
    (name,) = (name for name, stored in UNTYPED_DTYPES.items() if stored == dtype)
    return {(REBUILD_MODULE, REBUILD_NAMES[1]), ("torch.storage", "UntypedStorage"), ("torch", name)}


def test_the_classes_of_storages_exist():
    assert all(getattr(torch, name).dtype == dtype for name, dtype in STORAGES.items())


def test_no_other_file_of_ours_takes_private_names_from_checkpointing():
    import megatron_r1v2.checkpoint.megatron as room

    for path in sorted(Path(room.__path__[0]).glob("*.py")):
        if path.stem != torch_internals.__name__.rsplit(".", 1)[-1]:
            assert "import _" not in path.read_text(), path.name
