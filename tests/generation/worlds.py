"""The common part of tests/generation/: a small model whose weights do not depend on the layout, and prompts for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.checkpoint.hf.weights import load_hf_weights
from megatron_r1v2.config.schema import GenerationConfig, ParallelConfig
from megatron_r1v2.generation.cache_size import PhaseLoad
from megatron_r1v2.generation.engine import Request, RolloutEngine, Sampling
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.generation.sampling import Draw
from megatron_r1v2.models.r1v2 import R1V2Model, build_r1v2
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.types import Prompt
from tests.parallel_layouts import start_layout

SAMPLING = [(0.0, 1.0), (1.0, 1.0), (0.7, 0.8), (1.0, 1e-6)]
"""(temperature, top-p) of `make_requests`, in turn."""
VOCABULARY = 265
"""Of the tokenizer; the model's embedding has 300 rows."""
STOP = frozenset(range(100, 120))
"""Many, so that untrained responses end after about a dozen tokens."""
MAX_PROMPT_TOKENS = 64
MAX_RESPONSE_TOKENS = 24


def start(folder: str, parallel: ParallelConfig, **settings) -> tuple[R1V2Model, ParallelContext]:
    """Set up a layout, after another one if need be, and load the model into it."""
    context = start_layout(parallel)
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


def phase_load(model: R1V2Model, parallel: ParallelContext, settings: GenerationConfig, **changes) -> PhaseLoad:
    """Return the demands of a phase as the engine states them."""
    engine = make_engine(model, parallel, **dict(settings))
    return replace(engine._load(FeatureCache(0), 1), **changes)


def generate(engine: RolloutEngine, prompts, features, *, progress=None, begun=None, **sampling):
    defaults = {
        "num_responses": 2,
        "policy_version": 0,
        "temperature": 1.0,
        "max_response_tokens": MAX_RESPONSE_TOKENS,
    }
    chosen = Sampling(**(defaults | sampling))
    return engine.generate(prompts, chosen, features=features, progress=progress, begun=begun or {})


def generate_in_segments(engine: RolloutEngine, prompts, features, segment_tokens: int, **sampling):
    """Return rollouts that were generated a segment a phase, and how many phases there were."""
    rollouts, phases = [], 0
    while not rollouts or any(rollout.finish_reason == "segment" for rollout in rollouts):
        begun = {}
        for rollout in rollouts:
            begun.setdefault(rollout.prompt_key, []).append(rollout)
        going_on = [p for p in prompts if not begun or any(r.finish_reason == "segment" for r in begun[p.key])]
        new = generate(engine, going_on, features, begun=begun, segment_tokens=segment_tokens, **sampling)
        ended = [rollout for rollout in rollouts if rollout.prompt_key not in {p.key for p in going_on}]
        order = {prompt.key: place for place, prompt in enumerate(prompts)}
        rollouts = sorted(ended + new, key=lambda rollout: (order[rollout.prompt_key], rollout.sample_index))
        phases += 1
    return rollouts, phases


def assert_same_rollouts(results, expected, atol=1e-5):
    assert [(r.prompt_key, r.sample_index, r.finish_reason) for r in results] == [
        (r.prompt_key, r.sample_index, r.finish_reason) for r in expected
    ]
    assert [r.token_ids for r in results] == [r.token_ids for r in expected]
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.rollout_log_probs), torch.tensor(other.rollout_log_probs), atol=atol, rtol=0
        )


def make_requests(model, count: int, *, tokens: int = 24) -> list[Request]:
    """Return requests that are all drawn differently; every second one wants alternatives."""
    return [
        Request(
            request_id=100 + number,
            prompt=prompt,
            draw=Draw(number * 7919, *SAMPLING[number % len(SAMPLING)], num_alternatives=3 * (number % 2)),
            max_response_tokens=tokens - number % 3,
        )
        for number, prompt in enumerate(make_prompts(model, count))
    ]


def run(engine, arrivals, *, cancel=None, longest=24) -> dict[int, list]:
    """Add requests before the steps they are listed under and collect the tokens of each.

    Args:
        arrivals: by step.
        cancel: request ids by step.
    """
    results: dict[int, list] = {}
    with engine.open_phase(longest, FeatureCache(0)) as phase:
        step = 0
        while step <= max(arrivals) or phase.num_in_flight:
            engine.add(phase, arrivals.get(step, []), FeatureCache(0))
            for request_id in (cancel or {}).get(step, []):
                phase.cancel(request_id)
            for token in phase.step() if phase.num_in_flight else []:
                results.setdefault(token.request_id, []).append(token)
            step += 1
    return results
