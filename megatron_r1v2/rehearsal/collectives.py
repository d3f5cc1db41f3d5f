"""The collectives of a rank in their order, and whether those of several ranks fit together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, zip_longest

_SEND, _RECEIVE, _BROADCAST = "send", "recv_", "broadcast_"
# One rank has the tensors of all: their number differs from that of the others.
_ROOTED = ("gather_", "scatter_")


@dataclass(frozen=True)
class Collective:
    """One call."""

    kind: str
    """torch's name of the operator, or "object:" and the name of the function for pickled objects."""
    ranks: tuple[int, ...]
    """Of the group, by their numbers in the world."""
    dtype: str
    count: int
    """Elements of all tensors of the call on this rank."""
    num_bytes: int
    peer: int = -1
    """The other rank of a send or a receive, or the root of a broadcast; -1: no such."""
    phase: str = ""

    @property
    def what(self) -> tuple[object, ...]:
        """Return what must be the same on all ranks of the group."""
        if self.kind in _ROOTED:
            return self.kind, self.dtype
        # Ranks that name other roots of a broadcast wait for each other too.
        return self.kind, self.dtype, self.count, self.peer

    def describe(self) -> str:
        """Return the call in words."""
        root = f" from rank {self.peer}" if self.kind == _BROADCAST and self.peer >= 0 else ""
        return f"{self.kind} of {self.count} {self.dtype}{root} ({self.phase})"


class CollectiveLog:
    """The calls of one rank."""

    def __init__(self) -> None:
        self.calls: list[Collective] = []
        self._is_quiet = False

    def add(self, call: Collective) -> None:
        """Note a call."""
        if not self._is_quiet:
            self.calls.append(call)

    @contextmanager
    def as_one(self, call: Collective) -> Iterator[None]:
        """Note one call for all that are made inside the block: sizes and bytes of a pickled object."""
        self.add(call)
        former, self._is_quiet = self._is_quiet, True
        try:
            yield
        finally:
            self._is_quiet = former


def count_by_kind(calls: Sequence[Collective]) -> dict[tuple[str, int, str], tuple[int, int]]:
    """Return how many calls there are and how many bytes they carry, by kind, size of the group and dtype."""
    counts: Counter[tuple[str, int, str]] = Counter()
    sizes: Counter[tuple[str, int, str]] = Counter()
    for call in calls:
        key = (call.kind, len(call.ranks), call.dtype)
        counts[key] += 1
        sizes[key] += call.num_bytes
    return {key: (counts[key], sizes[key]) for key in counts}


def find_mismatches(by_rank: Mapping[int, Sequence[Collective]]) -> list[str]:
    """Return where ranks of one group would wait for each other for ever, in words; empty: they fit together.

    Args:
        by_rank: the calls of each rank that was rehearsed, by its number in the world.
    """
    found: list[str] = []
    for (one, calls), (other, others) in combinations(sorted(by_rank.items()), 2):
        groups = {call.ranks: None for call in (*calls, *others)}
        shared = [group for group in groups if {one, other} <= set(group)]
        of_groups = [
            mismatch
            for group in shared
            for mismatch in _compare_group(one, other, _of_group(calls, group), _of_group(others, group), group)
        ]
        found += of_groups or _compare_order(one, other, calls, others, shared)
        for sender, receiver, sent, received in ((one, other, calls, others), (other, one, others, calls)):
            found += _compare_transfers(sender, receiver, sent, received)
    return found


def _of_group(calls: Sequence[Collective], group: tuple[int, ...]) -> list[Collective]:
    return [call for call in calls if call.ranks == group and call.kind not in (_SEND, _RECEIVE)]


def _compare_group(
    one: int, other: int, calls: Sequence[Collective], others: Sequence[Collective], group: tuple[int, ...]
) -> list[str]:
    for number, (mine, theirs) in enumerate(zip_longest(calls, others)):
        if mine is None or theirs is None or mine.what != theirs.what:
            told = [f"rank {rank}: {_told(call)}" for rank, call in ((one, mine), (other, theirs))]
            return [f"call {number + 1} in the group of {len(group)} ranks ({_short(group)}): {'; '.join(told)}"]
    return []


def _compare_order(
    one: int,
    other: int,
    calls: Sequence[Collective],
    others: Sequence[Collective],
    groups: Sequence[tuple[int, ...]],
) -> list[str]:
    """Compare the order of calls in several groups: each rank may wait in a group for the other one."""
    among = frozenset(groups)
    mine, theirs = (
        [call for call in each if call.ranks in among and call.kind not in (_SEND, _RECEIVE)]
        for each in (calls, others)
    )
    for first, second in zip(mine, theirs, strict=True):
        if first.ranks != second.ranks:
            told = [
                f"rank {rank}: {call.describe()} in the group of {len(call.ranks)} ranks ({_short(call.ranks)})"
                for rank, call in ((one, first), (other, second))
            ]
            return [f"calls in two groups come in another order: {'; '.join(told)}"]
    return []


def _compare_transfers(
    sender: int, receiver: int, calls: Sequence[Collective], others: Sequence[Collective]
) -> list[str]:
    sent = [call for call in calls if call.kind == _SEND and call.peer == receiver]
    received = [call for call in others if call.kind == _RECEIVE and call.peer == sender]
    for number, (mine, theirs) in enumerate(zip_longest(sent, received)):
        if mine is None or theirs is None or (mine.dtype, mine.count) != (theirs.dtype, theirs.count):
            return [
                f"transfer {number + 1} from rank {sender} to rank {receiver}: sent {_told(mine)}; "
                f"awaited {_told(theirs)}"
            ]
    return []


def _told(call: Collective | None) -> str:
    return "nothing" if call is None else call.describe()


def _short(group: tuple[int, ...]) -> str:
    return ", ".join(map(str, group[:4])) + (", ..." if len(group) > 4 else "")
