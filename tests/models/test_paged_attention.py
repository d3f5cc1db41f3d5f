"""The torch stand-in for flash-attn against dense attention, request by request."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.models import paged_attention
from megatron_r1v2.models.decode_plan import plan_decode
from megatron_r1v2.models.paged_attention import BlockTable

BLOCK = 4
SIZE = 8


def make_cache(lengths: list[int], kv_heads: int, generator: torch.Generator):
    """Scatter random keys and values of requests over blocks in random order; return the dense ones too."""
    needed = [-(-length // BLOCK) for length in lengths]
    blocks = torch.randperm(sum(needed) + 3, generator=generator)
    cache = torch.full((2, len(blocks), BLOCK, kv_heads, SIZE), 7.0)
    table = torch.full((len(lengths), max(needed) + 1), -1, dtype=torch.int32)
    dense, taken = [], 0
    for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        mine = blocks[taken : taken + count]
        taken += count
        table[row, :count] = mine
        keys_values = torch.randn(2, length, kv_heads, SIZE, generator=generator)
        dense.append(keys_values)
        for position in range(length):
            cache[:, mine[position // BLOCK], position % BLOCK] = keys_values[:, position]
    return cache, table, dense


def dense_attention(query: torch.Tensor, keys_values: torch.Tensor) -> torch.Tensor:
    """Attend from the last tokens of one request, with repeated key heads and an explicit causal mask."""
    count, heads, _ = query.shape
    length = keys_values.shape[1]
    key, value = (part.repeat_interleave(heads // part.shape[1], dim=1).transpose(0, 1) for part in keys_values)
    mask = torch.ones(count, length).tril(length - count).bool()
    return F.scaled_dot_product_attention(query.transpose(0, 1), key, value, attn_mask=mask).transpose(0, 1)


def attend(lengths, query_lengths, kv_heads, seed, *, in_place=False, padding=3):
    generator = torch.Generator().manual_seed(seed)
    cache, table, dense = make_cache(lengths, kv_heads, generator)
    queries = [torch.randn(count, 4, SIZE, generator=generator) for count in query_lengths]
    decode_only = max(query_lengths) == 1
    pad = torch.full((padding, 4, SIZE), 9.0)
    pad_rows = padding if decode_only else 1
    bounds = torch.tensor([0, *query_lengths]).cumsum(0)
    bounds = torch.cat([bounds, bounds[-1].repeat(pad_rows)]).int()
    rows = [row for row, count in enumerate(query_lengths) if count == 1]
    plan = None
    if in_place and rows:
        plan = plan_decode([table[row].tolist() for row in rows], [lengths[row] for row in rows], BLOCK, torch.float32)
    out = paged_attention.flash_decode_and_prefill(
        torch.cat([*queries, pad]).unsqueeze(1),
        cache[0],
        cache[1],
        max(query_lengths),
        max(lengths),
        bounds,
        torch.tensor([*lengths, *[0] * pad_rows], dtype=torch.int32),
        BlockTable(torch.cat([table, torch.full((pad_rows, table.shape[1]), -1, dtype=torch.int32)]), plan),
        decode_only,
    )
    expected = [dense_attention(query, keys_values) for query, keys_values in zip(queries, dense, strict=True)]
    return out, torch.cat(expected)


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 13), st.integers(0, 12)), min_size=1, max_size=5),
    kv_heads=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 1000),
    in_place=st.booleans(),
)
def test_mixed_prefill_and_decode_equal_dense_attention(requests, kv_heads, seed, in_place):
    lengths = [new + old for new, old in requests]
    out, expected = attend(lengths, [new for new, _ in requests], kv_heads, seed, in_place=in_place)
    assert out.shape[0] == len(expected) + 3
    torch.testing.assert_close(out[: len(expected), 0], expected, atol=1e-5, rtol=1e-5)
    assert out.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 17), min_size=1, max_size=6),
    kv_heads=st.sampled_from([1, 2, 4]),
    in_place=st.booleans(),
)
def test_decode_equals_dense_attention(lengths, kv_heads, in_place):
    out, expected = attend(lengths, [1] * len(lengths), kv_heads, seed=3, in_place=in_place)
    torch.testing.assert_close(out[: len(expected), 0], expected, atol=1e-5, rtol=1e-5)
    assert not out[len(expected) :].any(), "a padding request gives zeros"


def test_the_context_view_hides_dynamic_batching_only():
    class Context:
        block_size_tokens = 4

        def is_static_batching(self):
            return False

        def is_dynamic_batching(self):
            return True

    view = paged_attention.TorchAttentionContext(Context())
    assert view.block_size_tokens == 4
    assert not view.is_static_batching()
    assert not view.is_dynamic_batching()
