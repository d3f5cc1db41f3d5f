"""Commands of the first rank to all ranks while each is at its own work: through the store, where nobody waits.

One rank decides, and all follow its commands one after the other, so that none can leave for one collective while
another enters a different one.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_r1v2.parallel.groups import ParallelContext


class RankCommands:
    """The commands of a run in their order, and the reports of the ranks that the first one decides by."""

    def __init__(self, context: ParallelContext) -> None:
        """Begin without commands; a run has one object, since the keys in the store are counted."""
        self._context = context
        self._store = context.store
        self._reported: set[str] = set()
        self._sent = self._received = 0

    def report(self, event: str) -> None:
        """Let the first rank know that something happened on this rank; a second time changes nothing."""
        if event not in self._reported:
            self._reported.add(event)
            self._store.add(f"commands/reports/{event}", 1)

    def count_reports(self, event: str) -> int:
        """Return how many ranks have reported an event."""
        return self._store.add(f"commands/reports/{event}", 0)

    def send(self, command: str) -> None:
        """Command all ranks, this one too, what to do next; called on the first rank alone."""
        self._store.set(f"commands/{self._sent}", command)
        self._sent += 1

    def receive(self, group: dist.ProcessGroup | None = None) -> str | None:
        """Collective over `group`, if given: return the next command, on all of it the same; None: none is there."""
        key = f"commands/{self._received}"
        arrived = self._store.has([key])
        if group is not None and dist.get_world_size(group) > 1:
            # The command may come between the looks of two ranks: who has not seen it finds it below.
            arrived_on_any = torch.tensor([int(arrived)], device=self._context.device)
            dist.all_reduce(arrived_on_any, op=dist.ReduceOp.MAX, group=group)
            arrived = bool(arrived_on_any.item())
        if not arrived:
            return None
        self._received += 1
        return self._store.get(key)
