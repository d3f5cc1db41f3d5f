"""Blocks of the cache: counted references, and prompts that stay until the room is needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_r1v2.generation.blocks import SharedBlockAllocator


@pytest.fixture
def allocator(one_rank) -> SharedBlockAllocator:
    """Return an allocator of ten blocks, one of them megatron-core's dummy."""
    replaced = SimpleNamespace(total_count=10, paused_count=0)
    context = SimpleNamespace(
        block_allocator=replaced,
        paused_request_count=0,
        total_request_count=0,
        request_kv_block_counts=torch.tensor([3, 2, 4]),
    )
    return SharedBlockAllocator(context)


def release(allocator: SharedBlockAllocator, *blocks: int) -> None:
    allocator.release_memory_blocks(torch.tensor(blocks, dtype=torch.int32))


def test_all_blocks_but_the_dummy_are_given_out_once(allocator):
    taken = allocator.allocate_memory_blocks(9)
    assert taken.dtype is torch.int32
    assert sorted(taken.tolist()) == list(range(9))
    assert allocator.allocate_memory_blocks(1) is None
    assert taken.tolist() == list(range(9)), "neighbours for one request"
    assert allocator.total_avail == 0
    assert allocator.get_active_used() == 9
    release(allocator, *taken.tolist())
    assert allocator.total_avail == 9


def test_a_block_goes_back_with_its_last_reference(allocator):
    block, other = allocator.take(2)
    allocator.share([block, block])
    assert allocator.total_avail == 7, "a reference more takes no room"
    release(allocator, block)
    assert allocator.total_avail == 7
    release(allocator, block, other, block)
    assert allocator.total_avail == 9, "one call may name a block as often as requests end together"
    with pytest.raises(AssertionError, match="released more often"):
        release(allocator, block)


def test_kept_blocks_are_available_but_taken_last_and_from_the_end(allocator):
    prompt = allocator.take(3)
    allocator.keep("prompt", prompt)
    release(allocator, *prompt)
    assert allocator.total_avail == 9
    assert not set(allocator.take(6)) & set(prompt)
    assert allocator.kept_blocks("prompt") == prompt
    assert allocator.take(1) == prompt[2:]
    assert allocator.kept_blocks("prompt") == prompt[:2]
    assert allocator.total_avail == 2


def test_a_kept_block_in_use_is_not_reclaimed(allocator):
    first, second = allocator.take(2)
    allocator.keep("prompt", [first, second])
    release(allocator, second)
    assert allocator.count_available([first, second]) == 1
    assert second in allocator.take(8)
    assert allocator.kept_blocks("prompt") == [first]
    assert allocator.allocate_memory_blocks(1) is None


def test_a_kept_block_is_taken_into_use_again(allocator):
    (block,) = allocator.take(1)
    allocator.keep("prompt", [block])
    release(allocator, block)
    allocator.share([block])
    assert allocator.total_avail == 8
    allocator.drop("prompt")
    release(allocator, block)
    assert allocator.total_avail == 9
    assert sorted(allocator.take(9)) == list(range(9)), "it is free once, not twice"


def test_a_prompt_that_is_kept_anew_gives_its_old_blocks_back(allocator):
    old = allocator.take(2)
    allocator.keep("prompt", old)
    release(allocator, *old)
    new = allocator.take(2)
    allocator.keep("prompt", new)
    assert allocator.kept_blocks("prompt") == new
    allocator.drop("prompt")
    release(allocator, *new)
    assert sorted(allocator.take(9)) == list(range(9))


def test_paused_requests_resume_as_far_as_blocks_go(allocator):
    """megatron-core compares cumulative counts, each with a block more, with what it takes for available."""
    allocator.take(7)
    allocator.context.paused_request_count = 3
    assert allocator.get_paused_used() == 9
    cumulative = (allocator.context.request_kv_block_counts.flip(0) + 1).cumsum(0)
    fitting = int((cumulative <= allocator.get_active_avail()).sum())
    assert min(fitting, allocator.total_avail) == 2, "two blocks are left, and each request needs one"
    allocator.context.paused_request_count = 0
    assert allocator.get_paused_used() == 0
