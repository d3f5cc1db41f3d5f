"""Decoding requests read a paged cache in place, whatever they share, and see what dense attention sees."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.models.decode_plan import attend_in_place, plan_decode

BLOCK, SIZE = 4, 8


@st.composite
def requests(draw) -> tuple[list[list[int]], list[int], int]:
    """Return block tables, lengths and the number of blocks of groups that share the blocks of their prompts."""
    tables, lengths = [], []
    num_groups = draw(st.integers(1, 3))
    ids = draw(st.permutations(range(40)))
    for _ in range(num_groups):
        num_shared = draw(st.integers(0, 3))
        shared, ids = ids[:num_shared], ids[num_shared:]
        for _ in range(draw(st.integers(1, 3))):
            own = draw(st.integers(1, 3 * BLOCK))
            count = -(-own // BLOCK)
            tables.append([*shared, *ids[:count], *[-1] * draw(st.integers(0, 2))])
            lengths.append(num_shared * BLOCK + own)
            ids = ids[count:]
    return tables, lengths, 40


def dense(query_ND: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: list[int], length: int) -> torch.Tensor:
    keys, values = (
        cache[table[: -(-length // BLOCK)]].flatten(0, 1)[:length].repeat_interleave(len(query_ND) // k.shape[2], dim=1)
        for cache in (k, v)
    )
    scores = torch.einsum("nd,tnd->nt", query_ND, keys) / math.sqrt(SIZE)
    return torch.einsum("nt,tnd->nd", scores.softmax(dim=1), values)


@settings(max_examples=80, deadline=None)
@given(requests(), st.sampled_from([1, 2, 4]), st.integers(0, 100))
def test_every_request_attends_to_its_own_tokens(case, kv_heads, seed):
    tables, lengths, count = case
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(count, BLOCK, kv_heads, SIZE, generator=generator) for _ in range(2))
    query = torch.randn(len(tables), 4, SIZE, generator=generator) * 3
    out = attend_in_place(query, k, v, plan_decode(tables, lengths, BLOCK, torch.float32), None)
    expected = [dense(query[row], k, v, tables[row], lengths[row]) for row in range(len(tables))]
    torch.testing.assert_close(out, torch.stack(expected), atol=2e-5, rtol=1e-5)


def test_a_shared_block_is_read_once_and_own_blocks_together():
    """Two requests share blocks 7 and 8; their own, 1 and 2, and those of a third, 3 and 5, are read at once."""
    plan = plan_decode([[7, 8, 1], [7, 8, 2], [3, 5]], [9, 12, 7], BLOCK, torch.float32)
    assert [(run.rows.tolist(), run.start, run.num_tokens) for run in plan.runs] == [([0, 1], 28, 8)]
    assert [(blocks.rows.tolist(), blocks.first) for blocks in plan.blocks] == [([0, 1, 2], 1), ([2], 5)]
    first, second = plan.blocks
    assert (first.mask == 0).sum(dim=-1).flatten().tolist() == [1, 4, 4]
    assert (second.mask == 0).sum(dim=-1).flatten().tolist() == [3]
    assert plan.parts_RM.tolist() == [[0, 2], [1, 3], [4, 5]]
    assert not plan.is_padding_RM.any()


def test_short_prompts_of_equal_length_are_one_batch():
    """Prompts of one block, 3, 5 and 9, have two, three and two requests; one of two blocks stands alone."""
    tables = [[3, 20], [3, 21], [5, 22], [5, 23], [5, 24], [9, 25], [9, 26], [11, 12, 27], [11, 12, 28]]
    plan = plan_decode(tables, [5] * 7 + [9] * 2, BLOCK, torch.float32)
    (copied,) = plan.copied
    assert copied.rows_UR.tolist() == [[0, 1, -1], [2, 3, 4], [5, 6, -1]]
    assert copied.blocks_UB.tolist() == [[3], [5], [9]]
    assert [(run.rows.tolist(), run.start, run.num_tokens) for run in plan.runs] == [([7, 8], 44, 8)]
    # Two parts of the run, nine of the batch, then the blocks.
    assert plan.parts_RM[:, 0].tolist() == [2, 3, 5, 6, 7, 8, 9, 0, 1]


@pytest.mark.parametrize(("blocks", "is_copied"), [(192 // BLOCK, True), (192 // BLOCK + 1, False)])
def test_long_prompts_are_not_copied(blocks: int, is_copied: bool):
    prompts = [list(range(begin, begin + blocks)) for begin in (0, 100)]
    tables = [[*prompt, 200 + 2 * number + own] for number, prompt in enumerate(prompts) for own in range(2)]
    plan = plan_decode(tables, [blocks * BLOCK + 1] * 4, BLOCK, torch.float32)
    assert (len(plan.copied), len(plan.runs)) == ((1, 0) if is_copied else (0, 2))


def test_own_blocks_are_read_over_small_gaps():
    """Of 12 blocks of two requests, 4 to 11 and 14 to 17: the gap of two is a quarter of what stands before it."""
    tables = [[*range(4, 12)], [*range(14, 18)]]
    plan = plan_decode(tables, [32, 16], BLOCK, torch.float32)
    (blocks,) = plan.blocks
    assert (blocks.first, blocks.rows.tolist()) == (4, [0] * 8 + [-1] * 2 + [1] * 4)
    assert blocks.mask is None
    wider = plan_decode([[*range(4, 12)], [*range(15, 19)]], [32, 16], BLOCK, torch.float32)
    assert [each.first for each in wider.blocks] == [4, 15]


def test_a_lone_request_reads_runs_of_blocks():
    plan = plan_decode([[4, 5, 6, 2, -1]], [14], BLOCK, torch.float32)
    assert [(run.rows.tolist(), run.start, run.num_tokens) for run in plan.runs] == [([0], 16, 12), ([0], 8, 2)]
    assert plan.blocks == ()


def test_the_cache_is_not_copied(monkeypatch):
    """Check that the kernel gets views of the cache."""
    seen: list[torch.Tensor] = []
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def spy(query, key, value, *args, **kwargs):
        seen.extend((key, value))
        return kernel(query, key, value, *args, **kwargs)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", spy)
    cache = torch.randn(2, 12, BLOCK, 2, SIZE)
    attend_in_place(
        torch.randn(3, 4, SIZE),
        cache[0],
        cache[1],
        plan_decode([[7, 8, 1], [7, 8, 2], [3, 5]], [9, 12, 7], BLOCK, torch.float32),
        None,
    )
    assert len(seen) == 6
    assert {tensor.untyped_storage().data_ptr() for tensor in seen} == {cache.untyped_storage().data_ptr()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype):
    query, cache = torch.randn(2, 4, SIZE), torch.randn(2, 9, BLOCK, 2, SIZE)
    outputs = {}
    for kind in (dtype, torch.float32):
        plan = plan_decode([[7, 8, 1], [7, 8, 2]], [9, 12], BLOCK, kind)
        outputs[kind] = attend_in_place(query.to(kind), *cache.to(kind), plan, None)
    assert outputs[dtype].dtype is dtype
    torch.testing.assert_close(outputs[dtype].float(), outputs[torch.float32], atol=0.03, rtol=0.03)
