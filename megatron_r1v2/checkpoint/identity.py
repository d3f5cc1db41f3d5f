"""The identity of a model: one SHA-256 of the parameters, whatever they are stored as.

Cryptographic, as it is compared between people: exported parts name the base that they belong to by it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from megatron_r1v2.checkpoint.hf.folders import JsonObject
from megatron_r1v2.checkpoint.sources import Source
from megatron_r1v2.checkpoint.tensor_files import TensorInfo, in_threads, tensor_bytes, tensor_info
from megatron_r1v2.models.architecture import R1V2Architecture


@dataclass(frozen=True)
class TensorIdentity:
    """Dtype, shape and bits of a tensor."""

    info: TensorInfo
    sha256: str

    def __str__(self) -> str:
        return f"{self.info.dtype_name} {list(self.info.shape)} {self.sha256[:12]}"


def tensor_identity(tensor: torch.Tensor) -> TensorIdentity:
    """Return the identity of a CPU tensor."""
    return TensorIdentity(tensor_info(tensor), hashlib.sha256(tensor_bytes(tensor)).hexdigest())


def combined_digest(identities: Mapping[str, TensorIdentity]) -> str:
    """Return one SHA-256 for many tensors: of a line for each, in order of name."""
    lines = (
        f"{name} {tensor.info.dtype_name} {list(tensor.info.shape)} {tensor.sha256}\n"
        for name, tensor in sorted(identities.items())
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def model_digest(source: Source, *, parts: tuple[str, ...], workers: int) -> str:
    """Return one SHA-256 of a model's architecture and the parameters of some parts."""
    names = [name for name in source.names() if name.split(".")[0] in parts]
    identities = in_threads(lambda ours: tensor_identity(source.parameter(ours)), names, workers=workers)
    described = f"{architecture_json(source.architecture)}\n{combined_digest(identities)}"
    return hashlib.sha256(described.encode()).hexdigest()


def architecture_json(architecture: R1V2Architecture | JsonObject) -> str:
    """Return an architecture as JSON with sorted keys, to compare it with one that was kept as a dictionary."""
    sizes = asdict(architecture) if isinstance(architecture, R1V2Architecture) else architecture
    return json.dumps(sizes, sort_keys=True)
