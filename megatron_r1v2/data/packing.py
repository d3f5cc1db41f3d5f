"""Packing: the choice of sequences, or of prompts with their responses, that share a row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PromptLengths:
    """The tokens of a prompt and of its responses."""

    prompt: int
    responses: Mapping[str, int]
    """By name."""


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


def share_prompts(groups: Sequence[PromptLengths], capacity: int) -> list[list[str]]:
    """Put responses into rows where the responses to one prompt stand behind it, and it counts once.

    Args:
        groups: in an order that all ranks and all runs agree on; names are distinct over all of them.
        capacity: the tokens of a row; a prompt whose responses do not fit into one row is in several, as few as first
            fit finds, and a longer response gets a row of its own.

    Returns:
        Names of each row, those of one prompt as neighbours.
    """
    pieces: dict[str, list[str]] = {}
    lengths: dict[str, int] = {}
    for index, group in enumerate(groups):
        for number, names in enumerate(first_fit_decreasing(group.responses, capacity - group.prompt)):
            piece = f"{index}/{number}"
            pieces[piece] = names
            lengths[piece] = group.prompt + sum(group.responses[name] for name in names)
    return [[name for piece in row for name in pieces[piece]] for row in first_fit_decreasing(lengths, capacity)]


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
    if mistake := nemo_mistake(longest, capacity):
        raise ValueError(mistake)
    # NeMo packs lengths without names, so the names of each length are handed out afterwards.
    names: dict[int, list[str]] = defaultdict(list)
    for name in reversed(_longest_first(lengths)):
        names[lengths[name]].append(name)
    histogram = [len(names[length]) for length in range(longest + 1)]
    rows, _ = create_packing_strategy(histogram, capacity, "first_fit_decreasing")
    return [[names[length].pop() for length in row] for row in rows]


def nemo_mistake(tokens: int, capacity: int) -> str | None:
    """Return an error for a sequence that NeMo's strategy cannot pack, None for one that fits into a row."""
    if tokens <= capacity:
        return None
    return (
        f"a sequence has {tokens} tokens, more than train.tokens_per_microbatch={capacity}; "
        "raise it, or set train.packing=first_fit_decreasing, which gives such a sequence a row of its own"
    )


def _longest_first(lengths: Mapping[str, int]) -> list[str]:
    # By name among equals, so that all ranks and all runs pack alike.
    return sorted(lengths, key=lambda name: (-lengths[name], name))
