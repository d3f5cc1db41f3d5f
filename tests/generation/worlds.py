"""What the tests of generation/ share: a small model with random weights, the same in every layout, and prompts."""

from __future__ import annotations

import torch

from megatron_r1v2.config.schema import GenerationConfig, ParallelConfig
from megatron_r1v2.generation.engine import RolloutEngine
from megatron_r1v2.models.architecture import LanguageArchitecture, R1V2Architecture, VisionArchitecture
from megatron_r1v2.types import Prompt

IMAGE_TOKEN = 7
VOCABULARY = 61
STOP = frozenset({3, 5})
TOKENS_PER_TILE = 16


def architecture(layers: int = 2, hidden: int = 32, vocabulary: int = VOCABULARY) -> R1V2Architecture:
    return R1V2Architecture(
        vision=VisionArchitecture(32, 1, 4, 64, 32, 4, "layer_norm", 1e-6, True, False),
        language=LanguageArchitecture(
            "qwen2", hidden, layers, 4, 2, hidden // 4, 2 * hidden, vocabulary, 4096, 1e4, 1e-6, True, False, False
        ),
        image_token_id=IMAGE_TOKEN,
        downsample_ratio=0.5,
    )


def make_prompts(count: int, *, tiles: int = 2, seed: int = 0) -> list[Prompt]:
    """Return prompts with different texts, lengths and images; every third one has no image."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for number in range(count):
        num_tiles = 0 if number % 3 == 2 else tiles
        text = torch.randint(8, VOCABULARY, (6 + number % 5,), generator=generator).tolist()
        images = [IMAGE_TOKEN] * TOKENS_PER_TILE * num_tiles
        prompts.append(
            Prompt(
                key=f"prompt-{number}",
                messages=(),
                token_ids=(*text[:3], *images, *text[3:]),
                tiles_TCHW=torch.randint(0, 256, (num_tiles, 3, 32, 32), generator=generator, dtype=torch.uint8),
                answer="",
                answer_type="exact",
            )
        )
    return prompts


def make_model(context, parallel: ParallelConfig, sizes: R1V2Architecture | None = None, **settings):
    """Build this rank's part of a model whose weights do not depend on the layout."""
    from megatron_r1v2.models.r1v2 import build_r1v2
    from megatron_r1v2.models.settings import ComputeSettings

    compute = ComputeSettings(
        tensor=parallel.tensor, pipeline=parallel.pipeline, sequence=parallel.sequence, **settings
    )
    model = build_r1v2(sizes or architecture(), compute, groups=context.groups, device=context.device)
    return model


def make_engine(model, context, *, seed: int = 11, max_prompt_tokens: int = 64, **settings) -> RolloutEngine:
    return RolloutEngine(
        model,
        context=context,
        settings=GenerationConfig(**{"kv_cache_gib": 0.01, "max_requests": 64, "max_tokens_per_step": 512} | settings),
        stop_ids=STOP,
        vocab_size=VOCABULARY,
        max_prompt_tokens=max_prompt_tokens,
        seed=seed,
    )
