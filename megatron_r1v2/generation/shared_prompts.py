"""megatron-core's engine with a prompt prefilled once for all responses to it.

The first response, the leader, is prefilled as usual. The others join after the step of its last chunk. They refer to
the full blocks of the prompt, own a copy of the last, partial one, and compute the last prompt token again: its logits
are those of their first token. A response that was evicted joins in the same way, as far as the prompt's blocks stand.
"""

from __future__ import annotations

import io
from collections import Counter, deque
from collections.abc import Hashable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field

import torch
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.sampling_params import SamplingParams
from typing_extensions import override

from megatron_r1v2.generation.blocks import SharedBlockAllocator


@dataclass(eq=False)
class _Prompt:
    """A prompt while responses to it are in flight."""

    key: Hashable
    num_tokens: int
    request_ids: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class _Prefix:
    """The part of a prompt that a response need not compute."""

    num_tokens: int
    shared: list[int]
    """Full blocks."""
    copied: int | None
    """The block with the last of these tokens, if they do not fill it."""


class SharedPromptEngine(DynamicInferenceEngine):
    """An engine whose context has a SharedBlockAllocator; requests are added with `add_response`."""

    @override
    def reset(self) -> None:
        super().reset()
        self.waiting_request_ids: deque[int]
        self._allocator: SharedBlockAllocator = self.context.block_allocator
        self._prompts: dict[Hashable, _Prompt] = {}
        self._prompt_of: dict[int, _Prompt] = {}
        self._unfinished: set[_Prompt] = set()
        """Prompts whose last chunk this step computes: nobody can join before the next one."""
        self.num_prefill_tokens = 0
        """Tokens of prompts, and of responses again after an eviction, that were computed."""
        self.num_shared_tokens = 0
        """Tokens that would have been computed too if no response shared its prompt."""

    @override
    def create_cuda_graphs(self, reset_context: bool = True) -> None:
        # megatron-core would show a progress bar on each rank and in each phase.
        with redirect_stderr(io.StringIO()):
            super().create_cuda_graphs(reset_context)

    def add_response(
        self,
        request_id: int,
        token_ids: Sequence[int],
        sampling_params: SamplingParams,
        prompt_key: Hashable,
        *,
        begun: Sequence[int] = (),
    ) -> None:
        """Queue a request.

        Args:
            token_ids: the prompt.
            prompt_key: requests with equal keys and tokens have the same images.
            begun: the response so far; it is computed again, as after an eviction.
        """
        # With the tokens: a prompt may end with the beginning of a response, under the same name.
        key = prompt_key, tuple(token_ids)
        prompt = self._prompts.setdefault(key, _Prompt(key, len(token_ids)))
        prompt.request_ids.add(request_id)
        self._prompt_of[request_id] = prompt
        self.add_request(request_id, [*token_ids, *begun], sampling_params)

    def forget(self, request_id: int) -> None:
        """Drop what is known of a request that has ended or left the queue."""
        prompt = self._prompt_of.pop(request_id)
        prompt.request_ids.remove(request_id)
        if not prompt.request_ids:
            del self._prompts[prompt.key]
            self._allocator.drop(prompt)

    @override
    def schedule_waiting_requests(self) -> None:
        """Schedule the chunk under way, then responses whose prompt is computed, then prompts; in order of arrival."""
        self._unfinished.clear()
        waiting = list(self.waiting_request_ids)
        scheduled = set(self._schedule(waiting))
        # megatron-core expects the request whose prompt is under way at the head.
        chunked = self.context.chunked_prefill_request_id
        left = [request_id for request_id in waiting if request_id not in scheduled]
        self.waiting_request_ids = deque(sorted(left, key=lambda request_id: request_id != chunked))

    def _schedule(self, waiting: Sequence[int]) -> Iterator[int]:
        """Schedule requests and yield them, until one finds no room."""
        context = self.context
        if context.chunked_prefill_request_id != -1:
            if not self._prefill(waiting[0]):
                return
            yield waiting[0]
            waiting = waiting[1:]
        num_waiting = Counter(self._prompt_of[request_id] for request_id in waiting)
        # Before new prompts: these responses need few blocks, and what they share need not be kept for later.
        for request_id in sorted(waiting, key=lambda request_id: self._find_prefix(request_id) is None):
            if context.paused_request_count or context.total_request_count == context.max_requests:
                return
            prompt = self._prompt_of[request_id]
            if prompt in self._unfinished:
                continue
            # Looked for again, because a request before this one may have taken kept blocks.
            prefix = self._find_prefix(request_id)
            # A prompt wants one more block for each response that will join.
            num_joining = 0 if prefix else num_waiting[prompt] - 1
            if not self._has_room(request_id, prefix or _Prefix(0, [], None), num_joining):
                return
            if not (self._join(request_id, prefix) if prefix else self._prefill(request_id)):
                return
            yield request_id

    def _prefill(self, request_id: int) -> bool:
        """Let megatron-core schedule one request, or a chunk of it; return whether its last token is scheduled."""
        request = self.get_request(request_id)
        num_left = request.remaining_prompt_length
        self.waiting_request_ids = deque([request_id])
        super().schedule_waiting_requests()
        num_tokens = num_left - request.remaining_prompt_length
        self.num_prefill_tokens += num_tokens
        if self.waiting_request_ids:
            if not num_tokens and self.context.chunked_prefill_request_id == request_id:
                self._hold(request_id)
            return False
        self._keep_prompt(self._prompt_of[request_id])
        return True

    def _hold(self, request_id: int) -> None:
        """Let a request wait between two chunks, when there are no blocks for the next one."""
        # Its one token in the step stands for nothing, but megatron-core would go on with it as in decoding, without a
        # new block: after a chunk that fills a block, keys and values at the block's beginning would be replaced.
        context = self.context
        context.token_to_block_idx[context.active_token_count - 1] = self._allocator.dummy_block_idx
        row = context.total_request_count - 1
        context.request_kv_length_offsets[row] = self.get_request(request_id).finished_chunk_token_count

    def _keep_prompt(self, prompt: _Prompt) -> None:
        """Keep the blocks of the prompt of the last request in the context, if it computed them itself."""
        num_blocks = self._count_blocks(prompt.num_tokens - 1)
        if len(self._allocator.kept_blocks(prompt)) < num_blocks:
            row = self.context.total_request_count - 1
            self._allocator.keep(prompt, self.context.request_to_kv_block_ids[row, :num_blocks].tolist())
            self._unfinished.add(prompt)

    def _find_prefix(self, request_id: int) -> _Prefix | None:
        """Return what a request can take from the cache; None where it has to compute its prompt."""
        prompt = self._prompt_of[request_id]
        blocks = self._allocator.kept_blocks(prompt)
        if not blocks or prompt in self._unfinished:
            return None
        size = self.context.block_size_tokens
        # The last prompt token is computed again, and all that no longer stands.
        num_tokens = min(prompt.num_tokens - 1, len(blocks) * size)
        num_full = num_tokens // size
        return _Prefix(num_tokens, blocks[:num_full], blocks[num_full] if num_tokens % size else None)

    def _has_room(self, request_id: int, prefix: _Prefix, num_joining: int) -> bool:
        """Return whether the cache holds a request behind a prefix, and a block for each of others."""
        num_blocks = self._count_blocks(len(self.get_request(request_id).prompt_tokens))
        # Kept blocks that no request refers to are available, but not once they are shared.
        num_taken = num_blocks - len(prefix.shared) + self._allocator.count_available(prefix.shared)
        # With nothing in flight the others need not fit: they follow when there is room.
        num_reserved = num_joining if self.context.total_request_count else 0
        fits: bool = self._allocator.is_memory_available(num_taken + num_reserved)
        # One token of the prompt, and the placeholder of `_join`.
        return fits and self.context.active_token_count + (2 if prefix.num_tokens else 1) <= self.context.max_tokens

    def _join(self, request_id: int, prefix: _Prefix) -> bool:
        """Schedule a request behind a prefix; return whether its last token is scheduled."""
        context, request = self.context, self.get_request(request_id)
        row, num_shared = context.total_request_count, len(prefix.shared)
        self._allocator.share(prefix.shared)
        table = context.request_to_kv_block_ids[row]
        table[:num_shared] = torch.tensor(prefix.shared, dtype=table.dtype, device=table.device)
        if prefix.copied is not None:
            # The kept block may itself be the last available one. Then it is taken, and the copy changes nothing.
            (block,) = self._allocator.take(1)
            context.memory_buffer[:, :, block] = context.memory_buffer[:, :, prefix.copied]
            table[num_shared] = block
        # megatron-core can begin behind other tokens only in a request whose first chunk is computed. That one is the
        # last in the context and has one token in the step, which the next chunk overwrites.
        context.request_ids[row] = request_id
        context.total_request_count += 1
        context.active_token_count += 1
        context.chunked_prefill_request_id = request_id
        request.finished_chunk_token_count = prefix.num_tokens
        request.remaining_prompt_tokens = request.prompt_tokens[prefix.num_tokens :]
        self.num_shared_tokens += prefix.num_tokens
        return self._prefill(request_id)

    def _count_blocks(self, num_tokens: int) -> int:
        size: int = self.context.block_size_tokens
        return -(-num_tokens // size)
