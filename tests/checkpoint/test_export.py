"""torch_dist as wide layouts leave it, their shards by arithmetic: what was sharded is exported bit for bit."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from checkpoint_tools import megatron_to_hf
from megatron_r1v2.checkpoint.hf.config import read_hf_architecture
from megatron_r1v2.checkpoint.hf.mapping import MappedParameter
from megatron_r1v2.checkpoint.hf.operations import Replicated, Stacked
from megatron_r1v2.checkpoint.megatron.parameter_names import dist_entry
from megatron_r1v2.checkpoint.megatron.run_folder import save_state
from megatron_r1v2.checkpoint.megatron.torch_internals import StorageInfo
from megatron_r1v2.checkpoint.sources import exported_rows
from tests.tiny_hf import tiny_hf_model, tiny_text_config, tiny_vision_config

Placed = list[tuple[int, tuple[int, ...], torch.Tensor]]


def placed(row: MappedParameter, tensors: dict[str, torch.Tensor], ranks: int) -> tuple[tuple[int, ...], Placed]:
    """The shape of the whole and, of each part, the tensor-parallel rank that writes it and where it begins."""
    shards = [row.to_shard(tensors, tensor_rank=rank, tensor_size=ranks) for rank in range(ranks)]
    parts = list(enumerate(shards))
    if isinstance(row.operation, Replicated):
        parts = parts[:1]
    elif isinstance(row.operation, Stacked):  # the gates of all ranks, then the others of all ranks
        parts = [(rank, shard.chunk(2)[half]) for half in (0, 1) for rank, shard in parts]
    dim = getattr(row.operation, "dim", 0)
    found, start = [], 0
    for rank, part in parts:
        found.append((rank, tuple(start if axis == dim else 0 for axis in range(part.dim())), part))
        start += part.shape[dim]
    shape = list(parts[0][1].shape)
    shape[dim] = start
    return tuple(shape), found


def save_sharded(model: Path, folder: Path, *, tensor: int, pipeline: int) -> None:
    """Write a checkpoint as tensor x pipeline ranks do: a file a rank, a record a shard."""
    architecture, _ = read_hf_architecture(model)
    tensors = load_file(model / "model.safetensors")
    files = {f"__{rank}_0.distcp": io.BytesIO() for rank in range(tensor * pipeline)}
    arrays: dict[str, TensorStorageMetadata] = {}
    storage = {}
    for row in exported_rows(architecture, "transformers"):
        entry = dist_entry(row.ours, architecture)
        shape, parts = placed(row, tensors, tensor)
        stacked = entry.layer is not None
        stage = entry.layer * pipeline // entry.num_layers if stacked else 0
        size = torch.Size((entry.num_layers, *shape) if stacked else shape)
        array = TensorStorageMetadata(TensorProperties(dtype=parts[0][2].dtype), size, [])
        array = arrays.setdefault(entry.key, array)
        for rank, start, part in parts:
            name = f"__{stage * tensor + rank}_0.distcp"
            stored, offsets = (part[None], (entry.layer, *start)) if stacked else (part, start)
            begin = files[name].tell()
            torch.save(stored.clone(), files[name])
            array.chunks.append(ChunkStorageMetadata(torch.Size(offsets), stored.shape))
            where = StorageInfo(name, begin, files[name].tell() - begin)
            storage[MetadataIndex(entry.key, torch.Size(offsets))] = where
    (folder / "tensors").mkdir(parents=True)
    for name, file in files.items():
        (folder / "tensors" / name).write_bytes(file.getvalue())
    (folder / "tensors" / ".metadata").write_bytes(pickle.dumps(Metadata(dict(arrays), storage_data=storage)))
    stated = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "tensors" / "metadata.json").write_text(json.dumps(stated))
    parts = ["adapter", "language", "vision"]
    save_state(folder, {"step": 1, "version": 0, "parts": parts, "trained": parts})


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 2), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2)])
def test_what_wide_layouts_leave_is_exported_bit_for_bit(tmp_path, tensor, pipeline):
    """Five heads of the tower and 331 words: padded wherever tensor > 1, as the 25 heads of InternViT-6B are."""
    vision = tiny_vision_config("6b", heads=5, head_size=8, layers=2, image_size=16, patch=4)
    text = tiny_text_config(vocab_size=331, hidden=64, heads=8, kv_heads=8, layers=2)
    model = tmp_path / "hf"
    tiny_hf_model(model, "6b", vision=vision, text=text, dtype=torch.bfloat16)
    save_sharded(model, tmp_path / "saved", tensor=tensor, pipeline=pipeline)
    assert len(list((tmp_path / "saved" / "tensors").glob("*.distcp"))) == tensor * pipeline
    options = ["--checkpoint", f"{tmp_path}/saved", "--base", str(model), "--output", f"{tmp_path}/out", "--quiet"]
    megatron_to_hf.main(options)
    got, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", model))
    assert got.keys() == expected.keys()
    assert [
        name for name in got if not torch.equal(got[name].view(torch.int16), expected[name].view(torch.int16))
    ] == []
