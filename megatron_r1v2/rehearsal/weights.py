"""Weights as fakes of the shapes that a folder's headers say: names and shapes are checked, no byte is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch._subclasses.fake_tensor import FakeTensor

from megatron_r1v2.checkpoint.hf import config, weights
from megatron_r1v2.checkpoint.hf.folders import SafetensorsFolder
from megatron_r1v2.checkpoint.megatron import tensor_checksum
from megatron_r1v2.checkpoint.tensor_files import TensorInfo, tensor_info
from megatron_r1v2.rehearsal.fake_tensors import FakeTensors
from megatron_r1v2.rehearsal.replacements import original, replace
from megatron_r1v2.rehearsal.watch import unwatched


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
