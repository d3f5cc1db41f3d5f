"""The functions that the GPU tests run in processes of their own; every tensor comes back on the CPU."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from transformers import InternVLForConditionalGeneration

from megatron_r1v2.config.schema import AlgorithmConfig, Packing, ParallelConfig, Recompute, TrainConfig
from megatron_r1v2.generation.cache_size import measure_room
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.models.log_probs import token_log_probs
from megatron_r1v2.models.paged_attention import is_flash_attention_usable
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel import groups
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.stages.grpo.updates import batch_loss
from megatron_r1v2.training.optimizer import build_optimizer
from megatron_r1v2.training.policy import Policy
from megatron_r1v2.types import Rollout
from tests.distributed.steps import (
    ALL_PARTS,
    CLIP,
    Material,
    Outcome,
    Split,
    collate_microbatch,
    make_policy,
    run_step,
    step_of_transformers,
)
from tests.generation.worlds import VOCABULARY, generate, make_engine, make_prompts

Numbers = dict[str, list[torch.Tensor]]
"""Log-probs, and gradients of each part."""
PARTS = {"vision": "vision_tower.", "adapter": "multi_modal_projector.", "language": "language_model."}


def without_tf32() -> None:
    """Let convolutions in fp32 be fp32: cuDNN rounds their inputs to 10 bits unless told not to."""
    torch.backends.cudnn.allow_tf32 = False


def take_step(
    folder: str,
    material: Material,
    parallel: dict[str, Any],
    split: Split,
    compute: dict[str, Any],
    packing: Packing = Packing.first_fit_decreasing,
) -> Outcome:
    """Take one step of all parts."""
    without_tf32()
    outcome = run_step(folder, material, ParallelConfig(**parallel), split, compute=compute, packing=packing)
    moved = {
        name: {key: value.cpu() for key, value in getattr(outcome, name).items()}
        for name in ("gradients", "log_probs", "logits")
    }
    return replace(outcome, **moved)


def transformers_in_bf16(folder: str, material: Material) -> Material:
    """Take the step of transformers on the CPU in bf16, its rotations still in fp32."""
    model = InternVLForConditionalGeneration.from_pretrained(folder).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return step_of_transformers(model, material.prompts, material.samples)


def errors(got: Material | Outcome, exact: Material) -> dict[str, float]:
    """Return how far log-probs (mean absolute) and the gradients of each part (relative, in the 2-norm) are off."""
    apart = torch.cat([(got.log_probs[name].float() - values).abs() for name, values in exact.log_probs.items()])
    found = {"log-probs": float(apart.mean())}
    for part, prefix in PARTS.items():
        names = [name for name in exact.gradients if name.startswith(prefix)]
        off = torch.stack([(got.gradients[name].float() - exact.gradients[name]).norm() for name in names]).norm()
        found[part] = float(off / torch.stack([exact.gradients[name].norm() for name in names]).norm())
    return found


def policy_of(folder: str, compute: dict[str, Any], parts: Iterable[str] = ALL_PARTS) -> tuple[Policy, ParallelContext]:
    """Set up one rank whose steps change nothing: the learning rate is 0."""
    without_tf32()
    parallel_state.destroy_model_parallel()
    parallel = ParallelConfig()
    context = groups.initialize(parallel, seed=1)
    policy = make_policy(folder, parallel, context, tuple(parts), Recompute.none, **compute)
    policy.optimizer, policy.scheduler = build_optimizer(policy.ddp, TrainConfig(clip_grad=0.0, learning_rate=0.0))
    return policy, context


def score(model: R1V2Model, context: ParallelContext, token_ids: tuple[int, ...], tiles: torch.Tensor) -> Any:
    """Return log-probs and logits of a row by the training forward."""
    ids = torch.tensor([token_ids], device=context.device)
    length = ids.shape[1] - 1
    # TransformerEngine's 8-bit products want whole multiples of tokens; what comes later changes nothing before it.
    padded = torch.nn.functional.pad(ids[:, :-1], (0, -length % 16))
    positions = torch.arange(padded.shape[1], device=context.device)[None]
    with torch.no_grad():
        logits = model(padded, positions, tiles_TCHW=tiles.to(context.device))[:, :length]
        log_probs = token_log_probs(logits, ids[:, 1:], temperature=1.0, vocab_size=VOCABULARY, groups=context.groups)
    return log_probs[0].cpu(), logits[0, :, :VOCABULARY].float().cpu()


def generate_and_score(folder: str, compute: dict[str, Any]) -> dict[str, float]:
    """Generate greedily and by drawing; hold tokens and log-probs against the training forward."""
    policy, context = policy_of(folder, compute)
    model = policy.model
    prompts = make_prompts(model, 4)
    engine = make_engine(model, context, kv_cache_gib=0.5)
    apart, below_best, drawn = [], [], []
    for temperature in (0.0, 1.0):
        rollouts = generate(engine, prompts, FeatureCache(10**9), temperature=temperature)
        for number, rollout in enumerate(rollouts):
            prompt = prompts[number // 2]
            log_probs, logits = score(model, context, prompt.token_ids + rollout.token_ids, prompt.tiles_TCHW)
            begin = len(prompt.token_ids) - 1
            apart.append((log_probs[begin:] - torch.tensor(rollout.rollout_log_probs)).abs())
            if temperature == 0:
                chosen = logits[begin:].gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
                below_best.append(logits[begin:].max(dim=1).values - chosen)
            else:
                drawn.append(rollout.token_ids)
    return {
        "largest": float(torch.cat(apart).max()),
        "mean": float(torch.cat(apart).mean()),
        "greedy is below the best by": float(torch.cat(below_best).max()),
        "different responses": float(len(set(drawn))),
    }


def steps_around_a_rollout(folder: str, material: Material, compute: dict[str, Any]) -> list[dict[str, float]]:
    """Take the same step twice, roll out, and take it twice again; return its metrics and what memory it took."""
    parts = ("adapter",) if compute.get("fp8_weights") else ALL_PARTS
    policy, context = policy_of(folder, compute, parts)
    # Many blocks, which would be seen if they stayed: responses end long before their limit.
    engine = make_engine(policy.model, context, kv_cache_gib=1.0, max_requests=256, max_tokens_per_step=1024)
    names = ("two/0", "text/0", "one/0")
    found = []
    for index in range(4):
        if index == 2:
            generate(engine, make_prompts(policy.model, 6), FeatureCache(0), max_response_tokens=1900)
        found.append(_measured_step(policy, context, material, names))
    return found


def _measured_step(
    policy: Policy, context: ParallelContext, material: Material, names: tuple[str, ...]
) -> dict[str, float]:
    gc.collect()
    on_gpu = context.device.type == "cuda"
    held = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    batches = [collate_microbatch(material, names, policy.model, context)]
    loss = partial(
        batch_loss,
        algorithm=AlgorithmConfig(clip_low=CLIP, clip_high=CLIP),
        aggregation="sequence",
        denominator=3,
    )
    metrics = policy.update(batches, loss).logged()
    del batches
    return metrics | {"bytes held": held, "peak bytes": torch.cuda.max_memory_allocated() - held if on_gpu else 0}


def rollouts_with_graphs(folder: str, compute: dict[str, Any]) -> dict[str, Any]:
    """Roll out eagerly and with graphs, before and after the weights change; and take a step in between."""
    policy, context = policy_of(folder, compute)
    model = policy.model
    found: dict[str, Any] = {}
    for when in ("before", "after"):
        for how, graphs in (("eager", False), ("graphs", True)):
            engine = make_engine(model, context, kv_cache_gib=0.5, cuda_graphs=graphs)
            found[f"{how} {when}"] = generate(engine, make_prompts(model, 4), FeatureCache(0), temperature=0.0)
        found[f"managers {when}"] = sum(hasattr(layer, "cudagraph_manager") for layer in model.language.decoder.layers)
        found[f"impl {when}"] = model.config.cuda_graph_impl
        ids = torch.zeros(1, 64, dtype=torch.int64, device=context.device)
        model(ids, torch.arange(64, device=context.device)[None]).float().square().mean().backward()
        with torch.no_grad():
            for parameter in model.language.parameters():
                parameter.mul_(1.5)
    return found


def rollouts_as_the_device_allows(folder: str, compute: dict[str, Any]) -> dict[str, Any]:
    """Roll out with a cache and graphs that are "auto", and with neither."""
    policy, context = policy_of(folder, compute)
    model, found = policy.model, {}
    for how, settings in (
        ("auto", {"kv_cache_gib": "auto", "cuda_graphs": "auto"}),
        ("given", {"kv_cache_gib": 0.5, "cuda_graphs": False}),
    ):
        engine = make_engine(model, context, **settings)
        found[how] = generate(engine, make_prompts(model, 4), FeatureCache(0), temperature=0.0)
        found[f"{how}, cache"], found[f"{how}, without graphs"] = engine.cache_bytes, engine.without_graphs
    free, total = torch.cuda.mem_get_info()
    load = make_engine(model, context)._load(FeatureCache(0), 1)
    room = measure_room(model.architecture, load, context.device, flash=True)
    held = torch.zeros(2**30, dtype=torch.uint8, device=context.device)
    fuller = measure_room(model.architecture, load, context.device, flash=True)
    found |= {"free": free, "total": total, "room": room.free, "with a GiB held": fuller.free, "held": held.numel()}
    found["flash"] = is_flash_attention_usable(model.config.params_dtype)
    found["fused"] = model.config.bias_activation_fusion
    return found


def tokens_of(rollouts: list[Rollout]) -> list[tuple[int, ...]]:
    return [rollout.token_ids for rollout in rollouts]
