"""Prompts that data-parallel replicas share: whoever has room takes the next one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.types import Prompt


class SharedPromptQueue:
    """An iterable of the prompts that this replica gets; every rank holds the same full list.

    Responses differ in length, so a fixed split leaves replicas idle. The next index is a counter in the store of the
    process group; the leader of a replica takes it and tells the ranks of its model-parallel group. What is generated
    does not depend on who generates it (see sampling.py).
    """

    def __init__(self, prompts: Sequence[Prompt], *, context: ParallelContext, name: str) -> None:
        """Make the queue.

        Args:
            prompts: the same on all ranks.
            context: where this rank stands.
            name: of the counter: the same on all ranks and never used before in this run, such as "step-12".
        """
        self.prompts = prompts
        self._context = context
        self._counter = f"prompt-queue/{name}"
        self._group = context.groups.mp
        self._leader = dist.get_process_group_ranks(self._group)[0]

    @property
    def fair_share(self) -> int:
        """Return how many prompts a replica may have in flight, so that the first to come leaves some to the rest."""
        return -(-len(self.prompts) // self._context.data_size)

    def __iter__(self) -> Iterator[Prompt]:
        """Yield prompts until none is left; each step is a collective of the replica's ranks."""
        if self._context.data_size == 1:
            yield from self.prompts
            return
        while (index := self._take()) < len(self.prompts):
            yield self.prompts[index]

    def _take(self) -> int:
        index = torch.zeros(1, dtype=torch.int64, device=self._context.device)
        if self._context.is_replica_leader:
            index.fill_(self._context.store.add(self._counter, 1) - 1)
        if self._context.tensor_size * self._context.pipeline_size > 1:
            dist.broadcast(index, src=self._leader, group=self._group)
        return int(index)
