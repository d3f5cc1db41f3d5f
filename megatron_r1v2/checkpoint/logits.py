"""The logits of models that lie in checkpoints of any kind, for one random input."""

from __future__ import annotations

import torch

from megatron_r1v2.checkpoint.hf.weights import fill_whole
from megatron_r1v2.checkpoint.sources import SourceSpec
from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.models.r1v2 import build_r1v2
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.parallel.groups import ParallelContext, initialize, shut_down

_TEXT_TOKENS = 16


def logits_of_both(first: SourceSpec, second: SourceSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Build each model on one rank in fp32 and run it on the same random tokens and the same random tile.

    Returns:
        Logits [1, S, V] of each.

    Raises:
        ValueError: the models have other sizes, or a source has not all parts.
    """
    context = initialize(ParallelConfig(), seed=0)
    try:
        return _logits_of(first, context), _logits_of(second, context)
    finally:
        shut_down()


def _logits_of(spec: SourceSpec, context: ParallelContext) -> torch.Tensor:
    with spec.open() as source:
        architecture = source.architecture
        parts = {name.split(".")[0] for name in source.names()}
        if len(parts) < 3:
            raise ValueError(f"logits need a whole model, and one of the two has {', '.join(sorted(parts))} only")
        # In fp32, so that a difference is one of the weights and not of rounding.
        settings = ComputeSettings(dtype=torch.float32)
        model = build_r1v2(architecture, settings, groups=context.groups, device=context.device)
        fill_whole(model, source.parameter)
    generator = torch.Generator().manual_seed(0)
    count = _TEXT_TOKENS + architecture.tokens_per_tile
    token_ids_BS = torch.randint(0, architecture.language.vocab_size, (1, count), generator=generator)
    # An image token that was drawn by chance would have no embedding.
    token_ids_BS[token_ids_BS == architecture.image_token_id] = 0
    token_ids_BS[0, 4 : 4 + architecture.tokens_per_tile] = architecture.image_token_id
    side = architecture.vision.image_size
    tiles_TCHW = torch.randint(0, 256, (1, 3, side, side), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        positions_BS = torch.arange(count)[None]
        device = context.device
        logits_BSV: torch.Tensor = model(
            token_ids_BS.to(device), positions_BS.to(device), tiles_TCHW=tiles_TCHW.to(device)
        )
    return logits_BSV.cpu()
