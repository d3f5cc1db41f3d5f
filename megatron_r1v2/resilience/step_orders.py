"""What the first rank tells all ranks to do while each is at its own work: through the store, where nobody waits.

One rank decides, and all follow its orders one after the other, so that none can leave for one collective while another
enters a different one.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.parallel.store import ask


class Orders:
    """The orders of a run, and what the ranks report for the first one to decide by."""

    def __init__(self, context: ParallelContext) -> None:
        """Begin with none; one for a run.

        Args:
            context: process groups.
        """
        self._context = context
        self._reported: set[str] = set()
        self._given = self._followed = 0

    def report(self, what: str) -> None:
        """Let the first rank know something of this rank; a second time changes nothing.

        Args:
            what: never means two things in a run.
        """
        if what not in self._reported:
            self._reported.add(what)
            ask(lambda store: store.add(f"orders/reports/{what}", 1))

    def reports(self, what: str) -> int:
        """Return how many ranks have reported something."""
        return int(ask(lambda store: store.add(f"orders/reports/{what}", 0)))

    def give(self, order: str) -> None:
        """Tell all ranks, this one too, what to do next; called on the first rank alone."""
        number = self._given
        ask(lambda store: store.set(f"orders/{number}", order))
        self._given += 1

    def next(self, group: dist.ProcessGroup | None = None) -> str | None:
        """Return an order that this rank has not had, or None.

        Args:
            group: ranks that ask together and get the same; None: this rank alone.
        """
        number = self._followed
        there = int(ask(lambda store: store.check([f"orders/{number}"])))
        if group is not None and dist.get_world_size(group) > 1:
            box = torch.tensor([there], device=self._context.device)
            dist.all_reduce(box, op=dist.ReduceOp.MAX, group=group)
            there = int(box.item())
        if not there:
            return None
        self._followed += 1
        return ask(lambda store: store.get(f"orders/{number}")).decode()
