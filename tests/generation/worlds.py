"""What the tests of generation/ share: a small model whose weights do not depend on the layout, and prompts for it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.checkpoint.hf.weights import load_hf_weights
from megatron_r1v2.config.schema import GenerationConfig, ParallelConfig
from megatron_r1v2.generation.engine import RolloutEngine
from megatron_r1v2.models.r1v2 import R1V2Model, build_r1v2
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.parallel import groups
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.types import Prompt

VOCABULARY = 265
"""Of the tokenizer; the model's embedding has 300 rows."""
STOP = frozenset(range(100, 120))
"""Many, so that untrained responses end after about a dozen tokens."""
MAX_PROMPT_TOKENS = 64
MAX_RESPONSE_TOKENS = 24


def start(folder: str, parallel: ParallelConfig, **settings) -> tuple[R1V2Model, ParallelContext]:
    """Set up a layout, after another one if need be, and load the model into it."""
    parallel_state.destroy_model_parallel()
    context = groups.initialize(parallel, seed=1)
    architecture = r1v2_architecture(json.loads((Path(folder) / "config.json").read_text()))
    compute = ComputeSettings(
        tensor=parallel.tensor, pipeline=parallel.pipeline, sequence=parallel.sequence, **settings
    )
    model = build_r1v2(architecture, compute, groups=context.groups, device=context.device)
    load_hf_weights(model, folder, context)
    return model, context


def make_prompts(model: R1V2Model, count: int, *, seed: int = 0) -> list[Prompt]:
    """Return prompts with different texts, lengths and images of two tiles; every third one has no image."""
    generator = torch.Generator().manual_seed(seed)
    architecture = model.architecture
    prompts = []
    for number in range(count):
        tiles = 0 if number % 3 == 2 else 2
        text = torch.randint(0, 100, (6 + number % 5,), generator=generator).tolist()
        images = [architecture.image_token_id] * architecture.tokens_per_tile * tiles
        prompts.append(
            Prompt(
                key=f"prompt-{number}",
                messages=(),
                token_ids=(*text[:3], *images, *text[3:]),
                tiles_TCHW=torch.randint(0, 256, (tiles, 3, 32, 32), generator=generator, dtype=torch.uint8),
            )
        )
    return prompts


def make_engine(model: R1V2Model, context: ParallelContext, *, seed: int = 11, **settings) -> RolloutEngine:
    return RolloutEngine(
        model,
        context=context,
        settings=GenerationConfig(**{"kv_cache_gib": 0.01, "max_requests": 64, "max_tokens_per_step": 512} | settings),
        stop_ids=STOP,
        vocab_size=VOCABULARY,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        seed=seed,
    )


def generate(engine: RolloutEngine, prompts, features, **arguments):
    defaults = {
        "num_responses": 2,
        "policy_version": 0,
        "temperature": 1.0,
        "max_response_tokens": MAX_RESPONSE_TOKENS,
    }
    return engine.generate(prompts, features=features, **(defaults | arguments))
