"""The place of each parameter in a torch_dist checkpoint: megatron-core's names for our names."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_r1v2.models.architecture import FUSED_NORM_NAMES, R1V2Architecture

_LAYER = re.compile(r"(vision|language)\.decoder\.layers\.(\d+)\.(.*)")


@dataclass(frozen=True)
class DistEntry:
    """A parameter in a torch_dist checkpoint, which stacks the layers of a block in one array."""

    key: str
    layer: int | None = None
    """Index along the first dimension of the array; None: the parameter is the array."""
    num_layers: int = 1


def dist_entry(ours: str, architecture: R1V2Architecture) -> DistEntry:
    """Return the place of a parameter.

    Args:
        ours: our name in the whole model, of the table in `mapping.py`.
    """
    match = _LAYER.fullmatch(ours)
    if match is None:
        return DistEntry(ours)
    part, layer, name = match[1], int(match[2]), match[3]
    if part == "language":
        for local, fused in FUSED_NORM_NAMES.items():
            if name.startswith(local):
                name = fused + name.removeprefix(local)
        num_layers = architecture.language.num_layers
    else:
        num_layers = architecture.vision.num_layers
    return DistEntry(f"{part}.decoder.layers.{name}", layer, num_layers)
