"""A queue of prompts for all data-parallel replicas: a replica with room takes the next one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.types import Prompt


class SharedPromptQueue:
    """The prompts of this replica, as an iterable; every rank holds the same full list.

    Responses differ in length, so a fixed split would leave replicas idle. A counter in the store of the process group
    holds the next index; the leader of a replica takes it and broadcasts it to the ranks of its model-parallel group.
    Responses do not depend on the replica that generates them (see sampling.py).

    Args:
        prompts: of all replicas, the same on every rank.
        own: prompts that this replica alone takes, before the others.
        name: the counter's name, such as "step-12": the same on all ranks, and never used before in this run.
    """

    def __init__(
        self, prompts: Sequence[Prompt], *, context: ParallelContext, name: str, own: Sequence[Prompt] = ()
    ) -> None:
        self.prompts = prompts
        self.own = own
        self._context = context
        self._counter = f"prompt-queue/{name}"
        self._group = context.groups.mp
        self._leader = dist.get_process_group_ranks(self._group)[0]

    @property
    def fair_share(self) -> int:
        """Return how many prompts a replica may begin with, so that the first to arrive leaves the others some."""
        return -(-len(self.prompts) // self._context.data_size) + len(self.own)

    def __len__(self) -> int:
        """Return how many prompts this replica may get."""
        return len(self.own) + len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        """Collective over `groups.mp` at each step: yield prompts until none is left."""
        yield from self.own
        # Nobody to share with, so no question to the store.
        if self._context.data_size == 1:
            yield from self.prompts
            return
        while (index := self._take()) < len(self.prompts):
            yield self.prompts[index]

    def _take(self) -> int:
        """Collective over `groups.mp`: take the next index."""
        index = torch.zeros(1, dtype=torch.int64, device=self._context.device)
        # `add` is atomic in the store: two replicas never get the same number. It returns the new value, from 1.
        if self._context.is_replica_leader:
            index.fill_(self._context.store.add(self._counter, 1) - 1)
        if self._context.tensor_size * self._context.pipeline_size > 1:
            dist.broadcast(index, src=self._leader, group=self._group)
        return int(index)
