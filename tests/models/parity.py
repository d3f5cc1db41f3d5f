"""Our model beside transformers', with the same weights, and how far their outputs and gradients are apart."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.checkpoint.hf.folders import read_json
from megatron_r1v2.checkpoint.hf.mapping import canonical_hf_name, parameter_map
from megatron_r1v2.checkpoint.hf.weights import load_hf_weights
from megatron_r1v2.models.r1v2 import R1V2Model, build_r1v2
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.parallel.groups import ParallelContext
from tests.tiny_hf import tiny_hf_model

MEAN = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)


def model_pair(folder: Path, context: ParallelContext, **variant: Any) -> tuple[R1V2Model, Any]:
    """Write a random model of transformers and load it into ours."""
    theirs = tiny_hf_model(folder, **variant)
    architecture = r1v2_architecture(read_json(folder / "config.json"))
    ours = build_r1v2(architecture, ComputeSettings(), groups=context.groups, device=context.device)
    load_hf_weights(ours, folder, context)
    return ours, theirs


def random_tiles(count: int, height: int = 32, width: int = 32, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return max |got - expected| / max |expected|."""
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def gradient_differences(ours: R1V2Model, theirs: Any, parts: Iterable[str]) -> dict[str, float]:
    """Compare the gradients that both models hold, by transformers' names; those of other parts must be absent."""
    mine = {name: parameter.grad for name, parameter in ours.named_parameters()}
    yours = {canonical_hf_name(name): parameter.grad for name, parameter in theirs.named_parameters()}
    results = {}
    for mapped in parameter_map(ours.architecture):
        if not mapped.exported:
            continue
        if mapped.ours.split(".")[0] not in parts:
            assert mine[mapped.ours] is None
            continue
        for name, gradient in mapped.to_hf([mine[mapped.ours]]).items():
            if "vision" in name and name.endswith("k_proj.bias"):
                continue  # softmax does not see it: its gradient is 0 but for rounding
            results[name] = difference(gradient, yours[name])
    return results
