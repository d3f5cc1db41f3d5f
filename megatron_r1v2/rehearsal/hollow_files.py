"""Files without bytes: the weights of a folder by their headers, and checkpoints that are described, not written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    extract_matching_values,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    apply_factories,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.optimizer import MegatronOptimizer
from torch._subclasses.fake_tensor import FakeTensor

from megatron_r1v2.checkpoint.hf import config, weights
from megatron_r1v2.checkpoint.hf.folders import SafetensorsFolder
from megatron_r1v2.checkpoint.megatron import tensor_checksum
from megatron_r1v2.checkpoint.tensor_files import TensorInfo, tensor_info
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.rehearsal.fake_tensors import FakeTensors
from megatron_r1v2.rehearsal.watch import original, replace, unwatched
from megatron_r1v2.training.store import CheckpointStore, Snapshot

_STATE = re.compile(r"^optimizer\.state\.[a-z_]+\.")


@dataclass(frozen=True)
class _Saved:
    """The description of one checkpoint."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of the whole tensors by key, of those that this rank has a part of."""
    objects: Mapping[str, object]
    common: Mapping[str, object]
    """All that is no tensor, the same on every rank."""


class HollowCheckpoints:
    """Stands in for `dist_checkpointing`'s files."""

    def __init__(self) -> None:
        self.num_bytes = 0
        """Of the largest checkpoint: what this rank would have handed to its writers, replicas included."""
        self._saved: dict[str, _Saved] = {}
        self._metadata_of_files = dist_checkpointing.load_tensors_metadata

    def install(self) -> None:
        """Put it in the place of the files."""
        for name in ("save", "load", "load_tensors_metadata"):
            replace(dist_checkpointing, name, getattr(self, name))

    def save(self, sharded: ShardedStateDict, folder: str, **_: object) -> None:
        """Describe a state instead of writing it; in the background or not is all the same."""
        # A copy: the caller's own description must stay as it is.
        state, _ = extract_matching_values(sharded, lambda _: True)
        apply_factories(state)
        parts, common = extract_matching_values(state, lambda leaf: isinstance(leaf, ShardedBase))
        leaves = list(nested_values(parts))
        tensors = [leaf for leaf in leaves if isinstance(leaf, ShardedTensor)]
        for tensor in tensors:
            tensor.validate_metadata_integrity()
        self.num_bytes = max(self.num_bytes, sum(_num_bytes(tensor) for tensor in tensors))
        self._saved[_final(folder)] = _Saved(
            {tensor.key: tuple(tensor.global_shape) for tensor in tensors},
            {leaf.unique_key: leaf.data for leaf in leaves if isinstance(leaf, ShardedObject)},
            common,
        )

    def load(self, sharded: ShardedStateDict, folder: str, **_: object) -> ShardedStateDict:
        """Return tensors of the shapes asked for.

        Raises:
            ValueError: a tensor is not in the checkpoint, or has another shape there.
        """
        state, nonpersistent, factories = load_preprocess(dict(sharded))
        parts, _ = extract_matching_values(state, lambda leaf: isinstance(leaf, ShardedBase))
        saved = self._saved.get(_final(folder))
        if saved is not None:
            for leaf in nested_values(parts):
                _check_saved(leaf, saved, folder)
        objects = saved.objects if saved is not None else {}
        loaded = cast(dict[str, object], dict(saved.common) if saved is not None else {})
        merge(loaded, dict_list_map_inplace(lambda leaf: _given_back(leaf, objects), parts))
        merge(loaded, nonpersistent)
        return cast(ShardedStateDict, apply_factory_merges(loaded, factories))

    def load_tensors_metadata(self, folder: str) -> object:
        """Return the whole shapes of the tensors of a checkpoint, by key."""
        saved = self._saved.get(_final(folder))
        if saved is None:
            with unwatched():
                return self._metadata_of_files(folder)
        return {
            key: ShardedTensor.from_rank_offsets(key, torch.empty(shape, device="meta"))
            for key, shape in saved.shapes.items()
        }


def install_load_after_save(*, is_alone: bool) -> None:
    """Let every save be followed by a load into the same run.

    Args:
        is_alone: whether this rank must do what the first one does: make the folder and its small files.
    """
    save_checkpoint = original(CheckpointStore, "save")

    def save(self: CheckpointStore, model: R1V2Model, optimizer: MegatronOptimizer, snapshot: Snapshot) -> Path:
        own = self.context
        if is_alone:
            self.context = changed(own, tensor_rank=0, pipeline_rank=0, data_rank=0)
        try:
            target: Path = save_checkpoint(self, model, optimizer, snapshot)
            self.finish_pending(blocking=True)
        finally:
            self.context = own
        dist.barrier()  # the first rank has published it when the others load
        self.load(target, model, optimizer, trained=snapshot.trained)
        return target

    replace(CheckpointStore, "save", save)


def _final(folder: str) -> str:
    """Return the name that a folder has when it is published: it is written under another one."""
    return str(Path(folder).parent.name.removeprefix(".").removesuffix(".partial"))


def _num_bytes(tensor: ShardedTensor) -> int:
    return tensor.data.numel() * tensor.data.element_size() if tensor.data is not None else 0


def _check_saved(leaf: object, saved: _Saved, folder: str) -> None:
    if isinstance(leaf, ShardedTensor) and not leaf.allow_shape_mismatch:
        # Each replica saves the optimizer's state of some parameters, in their shapes; this one stands for all.
        shape = saved.shapes.get(leaf.key) or saved.shapes.get(_STATE.sub("", leaf.key))
        if shape != tuple(leaf.global_shape):
            raise ValueError(
                f"{leaf.key} is {list(shape) if shape else 'missing'} in {folder} and {list(leaf.global_shape)} is "
                "asked for: what a run saves, it does not load"
            )


def _given_back(leaf: object, objects: Mapping[str, object]) -> object:
    if isinstance(leaf, ShardedTensor):
        # As megatron-core, which reads into the tensors that it is given.
        return leaf.data if leaf.data is not None else torch.empty(leaf.local_shape, dtype=leaf.dtype)
    return objects.get(leaf.unique_key) if isinstance(leaf, ShardedObject) else leaf


def install_hollow_weights(mode: FakeTensors) -> None:
    """Let folders give fakes; in a process of its own, where nothing is put back."""
    read, are_tied = original(SafetensorsFolder, "tensor"), original(config, "are_tied")

    def tensor(self: SafetensorsFolder, name: str) -> torch.Tensor:
        real = read(self, name)
        # On the CPU, as a mapped file is, and counted as little as that.
        with unwatched(), mode.fakes:
            return torch.empty(real.shape, dtype=real.dtype)

    def info(self: SafetensorsFolder, name: str) -> TensorInfo:
        return tensor_info(read(self, name))

    def are_really_tied(folder: SafetensorsFolder, stored: Mapping[str, str]) -> bool:
        replace(SafetensorsFolder, "tensor", read)
        try:
            with unwatched():
                return bool(are_tied(folder, stored))
        finally:
            replace(SafetensorsFolder, "tensor", tensor)

    replace(SafetensorsFolder, "tensor", tensor)
    replace(SafetensorsFolder, "info", info)
    # It casts what is no plain tensor (TransformerEngine's 8-bit weights), and would cast fakes.
    tensor_checksum.type = _plain_type  # type: ignore[attr-defined]  # in the place of Python's own
    for module in (config, weights):
        replace(module, "are_tied", are_really_tied)


def _plain_type(value: object) -> type:
    """Return the type of a value, for a fake that of the tensor in whose place it is."""
    return torch.Tensor if isinstance(value, FakeTensor) else type(value)
