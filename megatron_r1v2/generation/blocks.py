"""Blocks of the key-value cache with counted references: the responses to a prompt share its blocks.

megatron-core's allocator is a stack of ids, each owned by one request. Here a block goes back when its last owner has
released it. The blocks of a prompt stay after that, for the responses that have not begun, until others need the room.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from megatron.core.inference.contexts.dynamic_block_allocator import BlockAllocator
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from typing_extensions import override


class SharedBlockAllocator(BlockAllocator):
    """megatron-core's allocator, which replaces the one of a context.

    The ids are kept on the host: a release reads them from the device once, everything else reads nothing.
    """

    def __init__(self, context: DynamicInferenceContext) -> None:
        replaced = context.block_allocator
        super().__init__(context, replaced.total_count, replaced.paused_count)
        self.reset()

    @override
    def reset(self) -> None:
        super().reset()
        # The last block is megatron-core's dummy, which padding tokens are written to.
        # A stack, its top at the end. Blocks are given out in the order of their ids: those of a request are often
        # neighbours then, which the attention in torch reads at once.
        self._free = list(reversed(range(self.total_count - 1)))
        self._references = [0] * self.total_count
        self._prompts: dict[Hashable, list[int]] = {}
        """Kept blocks by prompt; a block belongs to one prompt at most."""
        self._kept: set[int] = set()
        """All blocks in `_prompts`: without a reference they are available, but not free."""

    # -- what megatron-core's context calls ----------------------------------------------------------------------

    @override
    def allocate_memory_blocks(self, num_blocks: int) -> torch.Tensor | None:
        """Return the ids of blocks, int32, each with one reference; None where there are too few."""
        if not self.is_memory_available(num_blocks):
            return None
        return torch.tensor(self.take(num_blocks), dtype=torch.int32, device=self.block_bag.device)

    @override
    def release_memory_blocks(self, blocks: torch.Tensor) -> None:
        """Drop a reference for each id; a block of N requests that end together is listed N times."""
        for block in reversed(blocks.tolist()):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} was released more often than taken"
            if not self._references[block]:
                self.total_avail += 1
                if block not in self._kept:
                    self._free.append(block)

    @override
    def get_active_used(self) -> int:
        """Return how many blocks requests refer to, each counted once."""
        used: int = self.get_total_used()
        return used

    @override
    def get_paused_used(self) -> int:
        """Return the sum of the paused requests' block counts."""
        # megatron-core asks in every step; mostly no request is paused, and nothing need be read from the device.
        if not self.context.paused_request_count:
            return 0
        used: int = super().get_paused_used()
        return used

    @override
    def get_active_avail(self) -> int:
        """Return the bound on the block counts of the paused requests that may resume."""
        # megatron-core compares this with sums of counts by request, which hold a shared block several times. Paused
        # requests are in the sums and among the used blocks: added here, they leave the decision to `total_avail`,
        # since each request that resumes needs one more block. For blocks that nobody shares nothing changes.
        bound: int = self.active_count - self.get_active_used() + self.get_paused_used()
        return bound

    # -- what shares prompts -------------------------------------------------------------------------------------

    def take(self, num_blocks: int) -> list[int]:
        """Return the ids of available blocks, each with one reference; kept blocks are taken last."""
        while len(self._free) < num_blocks:
            self._reclaim()
        blocks = [self._free.pop() for _ in range(num_blocks)]
        for block in blocks:
            self._references[block] = 1
        self.total_avail -= num_blocks
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Add a reference to each block."""
        self.total_avail -= self.count_available(blocks)
        for block in blocks:
            self._references[block] += 1

    def count_available(self, blocks: Sequence[int]) -> int:
        """Return how many of these blocks no request refers to."""
        return sum(not self._references[block] for block in blocks)

    def keep(self, prompt: Hashable, blocks: Sequence[int]) -> None:
        """Keep the blocks of a prompt, in its order, in place of those that it had."""
        self.drop(prompt)
        self._prompts[prompt] = list(blocks)
        self._kept.update(blocks)

    def kept_blocks(self, prompt: Hashable) -> list[int]:
        """Return the first blocks of a prompt, as far as they are still kept."""
        return list(self._prompts.get(prompt, ()))

    def drop(self, prompt: Hashable) -> None:
        """Keep the blocks of a prompt no longer than its requests."""
        for block in self._prompts.pop(prompt, ()):
            self._kept.discard(block)
            if not self._references[block]:
                self._free.append(block)

    def _reclaim(self) -> None:
        """Free one kept block that no request refers to."""
        # From the end of a prompt, so that what stays is its beginning. A request that refers to a block also refers to
        # those before it.
        for blocks in self._prompts.values():
            if blocks and not self._references[blocks[-1]]:
                block = blocks.pop()
                self._kept.discard(block)
                self._free.append(block)
                return
        raise AssertionError("total_avail counts a block that is neither free nor kept")
