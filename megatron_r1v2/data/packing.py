"""Packing: the choice of sequences that share a row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping


def first_fit_decreasing(lengths: Mapping[str, int], capacity: int) -> list[list[str]]:
    """Put each sequence, longest first, into the first row that has room for it.

    D. S. Johnson, "Near-optimal bin packing algorithms", 1973: at most 11/9 of the fewest possible rows, plus one.

    Args:
        lengths: the tokens of each sequence, by name.
        capacity: the tokens of a row; a longer sequence gets a row of its own.
    """
    rows: list[list[str]] = []
    room: list[int] = []
    for name in _longest_first(lengths):
        row = next((index for index, free in enumerate(room) if free >= lengths[name]), None)
        if row is None:
            rows.append([name])
            room.append(capacity - lengths[name])
        else:
            rows[row].append(name)
            room[row] -= lengths[name]
    return rows


def nemo_first_fit_decreasing(lengths: Mapping[str, int], capacity: int) -> list[list[str]]:
    """Pack the sequences with NeMo's `create_packing_strategy` (the `nemo` extra).

    Args:
        lengths: the tokens of each sequence, by name.
        capacity: the tokens of a row, at least those of the longest sequence.

    Raises:
        ValueError: a sequence is longer than a row, which NeMo does not check.
    """
    # NeMo is an extra, so it is imported only here.
    from nemo.utils.sequence_packing_utils import create_packing_strategy

    if not lengths:
        return []
    longest = max(lengths.values())
    if longest > capacity:
        raise ValueError(
            f"a sequence has {longest} tokens, more than train.tokens_per_microbatch={capacity}; "
            "raise it, or set train.packing=first_fit_decreasing, which gives such a sequence a row of its own"
        )
    # NeMo packs lengths without names, so the names of each length are handed out afterwards.
    names: dict[int, list[str]] = defaultdict(list)
    for name in reversed(_longest_first(lengths)):
        names[lengths[name]].append(name)
    histogram = [len(names[length]) for length in range(longest + 1)]
    rows, _ = create_packing_strategy(histogram, capacity, "first_fit_decreasing")
    return [[names[length].pop() for length in row] for row in rows]


def _longest_first(lengths: Mapping[str, int]) -> list[str]:
    # By name among equals, so that all ranks and all runs pack alike.
    return sorted(lengths, key=lambda name: (-lengths[name], name))
