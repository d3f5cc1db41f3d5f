"""The metadata of torch_dist folders: a pickle that may call nothing and name nothing outside."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from megatron_r1v2.checkpoint.megatron.parameter_names import DistEntry
from megatron_r1v2.checkpoint.megatron.torch_dist import TorchDist, read_records, write_index, write_records
from megatron_r1v2.checkpoint.tensor_files import digest_of, tensor_info
from tests.checkpoint.damage import convert, fresh


class Hostile:
    def __reduce__(self):
        return os.system, ("touch was-run",)


def test_a_pickle_in_metadata_calls_nothing(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work = fresh(folders / "megatron", tmp_path / "work")
    (work / "tensors" / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match="wants to call"):
        TorchDist(work / "tensors")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(("name", "told"), [("../secret", "accepted: files beside it"), ("gone", "is missing")])
def test_metadata_may_name_only_files_beside_it(folders, tmp_path, name, told):
    work = fresh(folders / "megatron", tmp_path / "work")
    path = work / "tensors" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = name
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=told):
        TorchDist(work / "tensors")


def test_parts_of_an_array_must_tile_it(folders, tmp_path):
    work = fresh(folders / "megatron", tmp_path / "work")
    path = work / "tensors" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    array = metadata.state_dict_metadata["adapter.linear_fc1.weight"]
    array.size = torch.Size([array.size[0] + 1, array.size[1]])
    path.write_bytes(pickle.dumps(metadata))
    assert not convert(work, tmp_path / "out")


def test_records_that_are_written_are_read_back_and_torch_loads_them(tmp_path):
    layers = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    bias = torch.arange(5, dtype=torch.bfloat16)
    entries = [(DistEntry("stack", n, 2), tensor_info(layers[n])) for n in range(2)]
    entries.append((DistEntry("bias"), tensor_info(bias)))
    counted = []
    tensors = [[layers[0, :1], layers[0, 1:]], [layers[1]], [bias]]
    written = write_records(tmp_path / "__0_0.distcp", entries, tensors, wrote=counted.append)
    assert counted == [48, 48, 10]
    assert [digest for _, digest in written] == [digest_of(layers[0]), digest_of(layers[1]), digest_of(bias)]
    records = [record for record, _ in written]
    again = list(read_records(tmp_path / "__0_0.distcp", records))
    assert torch.equal(again[1], layers[1:])
    write_index(tmp_path, [(entry, info, record) for (entry, info), record in zip(entries, records, strict=True)])
    ours = TorchDist(tmp_path)
    assert ours.array_names() == ["bias", "stack"]
    assert (ours.array("stack").shape, ours.num_chunks("stack")) == ((2, 3, 4), 2)
    assert torch.equal(ours.read(DistEntry("stack", 1, 2)), layers[1])
    theirs = {"stack": torch.zeros_like(layers), "bias": torch.zeros_like(bias)}
    load(theirs, storage_reader=FileSystemReader(str(tmp_path)), no_dist=True)
    assert torch.equal(theirs["stack"], layers)
    assert torch.equal(theirs["bias"], bias)


def test_another_number_of_layers_and_another_model_are_named(folders):
    dist = TorchDist(folders / "megatron" / "tensors")
    with pytest.raises(ValueError, match="but the model has 7 layers"):
        dist.info(DistEntry("language.decoder.layers.mlp.linear_fc1.weight", 0, 7))
    with pytest.raises(ValueError, match="has no 'nothing'; was it made from another model"):
        dist.read(DistEntry("nothing"))
