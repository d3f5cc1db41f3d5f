"""The cache of a phase: blocks, limits, padding of steps, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.inference.contexts import dynamic_context
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext

from megatron_r1v2.config.schema import GenerationConfig
from megatron_r1v2.generation.context import BlockwiseContext, UnpaddedContext, context_kind, make_context
from megatron_r1v2.generation.features import FeatureCache
from tests.generation.worlds import assert_same_rollouts, generate, make_engine, make_prompts, phase_load

GIB = 1024**3
# 2 layers x 64 tokens x 2 key heads x 24 channels x 4 bytes, for keys and for values.
BLOCK_BYTES = 2 * 64 * 2 * 24 * 4 * 2


def make(one_rank, *, tokens: int = 100, **settings) -> DynamicInferenceContext:
    model, parallel = one_rank
    defaults = {"kv_cache_gib": 1.0, "max_requests": 3, "max_tokens_per_step": 40}
    generation = GenerationConfig(**(defaults | settings))
    return make_context(model, parallel, generation, phase_load(model, parallel, generation), tokens)


@pytest.mark.parametrize(
    ("fp8", "recipe", "cuda_graphs", "kind", "tokens"),
    [
        (None, None, False, UnpaddedContext, 1),
        (None, None, True, DynamicInferenceContext, 64),
        ("hybrid", "tensorwise", False, DynamicInferenceContext, 64),
        ("e4m3", "blockwise", False, BlockwiseContext, 1024),
        ("e4m3", "blockwise", True, BlockwiseContext, 1024),
    ],
)
def test_the_padding_of_a_step_suits_its_products(fp8, recipe, cuda_graphs, kind, tokens):
    config = SimpleNamespace(fp8=fp8, fp8_recipe=recipe)
    chosen = context_kind(config, cuda_graphs=cuda_graphs)
    assert chosen is kind
    assert chosen.round_up_tokens(1, 1) == tokens


def test_limits_are_whole_multiples_of_the_padding(one_rank):
    context = make(one_rank)
    assert (context.max_requests, context.max_tokens) == (3, 40), "nothing is padded on one rank"
    assert make(one_rank, max_requests=50, max_tokens_per_step=50).max_tokens == 50, "a token for each request"
    kind = context_kind(SimpleNamespace(fp8=None, fp8_recipe=None), cuda_graphs=False)
    assert [kind.round_up_tokens(3, ranks) for ranks in (1, 2, 4)] == [3, 4, 4], "sequence parallelism divides a step"


def test_the_cache_has_the_blocks_of_all_requests_and_one_for_padding(one_rank):
    """100 tokens are two blocks of 64."""
    context = make(one_rank)
    assert context.block_size_tokens == 64
    assert context.max_sequence_length == 128
    blocks = context.memory_buffer.numel() * context.memory_buffer.element_size() // BLOCK_BYTES
    assert blocks == 3 * 2 + 1


def test_a_small_limit_gives_as_many_blocks_as_fit(one_rank):
    context = make(one_rank, kv_cache_gib=4.9 * BLOCK_BYTES / GIB)
    blocks = context.memory_buffer.numel() * context.memory_buffer.element_size() // BLOCK_BYTES
    assert blocks == 4


def test_the_cache_is_finite_from_the_start(one_rank):
    assert not make(one_rank).memory_buffer.any()


def test_a_cache_without_room_for_one_sequence_says_how_much_it_needs(one_rank):
    with pytest.raises(ValueError, match=r"generation.kv_cache_gib=0.0001 holds 1 blocks of 64 tokens") as refused:
        make(one_rank, tokens=300, kv_cache_gib=0.0001)
    message = str(refused.value)
    assert "300 tokens (prompt and response) needs 5" in message
    enough = float(re.search(r"at least ([0-9.e-]+)", message).group(1))
    assert enough == pytest.approx(6 * BLOCK_BYTES / GIB, rel=0.01)
    assert torch.isfinite(make(one_rank, tokens=300, kv_cache_gib=enough * 1.01).memory_buffer).all()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("flash", [False, True])
def test_the_cache_begins_with_zeros_whatever_reads_it(one_rank, monkeypatch, flash, device):
    """On a GPU too, whose memory is this machine's here: flash-attn reads what stale rows hold."""
    model, parallel = one_rank
    one_rank = model, replace(parallel, device=torch.device(device))
    monkeypatch.setattr("megatron_r1v2.generation.context.is_flash_attention_usable", lambda _: flash)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch then fills fresh memory with NaN
    try:
        context = make(one_rank)
    finally:
        torch.use_deterministic_algorithms(False)
    assert context.block_size_tokens == (256 if flash else 64)
    assert not context.memory_buffer.any()


def test_a_cpu_fills_its_cache_without_triton(one_rank, monkeypatch):
    """As megatron-core does without it; torch from PyPI brings it, and its kernels refuse tensors of a CPU."""
    model, parallel = one_rank

    def refuse(**_) -> None:
        raise AssertionError("All tensors must be on CUDA devices.")

    def rollouts():
        return generate(make_engine(model, parallel), make_prompts(model, 3), FeatureCache(0))

    with monkeypatch.context() as without:
        without.setattr(dynamic_context, "triton_append_key_value_cache", None)
        without.delattr(UnpaddedContext, "append_key_value_cache")
        expected = rollouts()
    monkeypatch.setattr(dynamic_context, "triton_append_key_value_cache", refuse)
    assert_same_rollouts(rollouts(), expected)
