"""Preference pairs from scored responses, with a count of every reason for which something was dropped.

The chosen response is always right, finished and well-formed, since MPO also trains on it by its generation term. The
reasons are counted under `response/*`, `pair/*` and `prompt/*`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from megatron_r1v2.types import Preference

CORRECTNESS = "correctness"
"""The chosen response is right, the rejected one is wrong."""
MARGIN = "margin"
"""Both are right; the rejected one has the lower total reward."""
DROPOUT_NTP = "dropout_ntp"
"""The rejected response is the first half of the chosen one, continued without the image."""

# Totals are sums of products: differences that are equal on paper differ in the last bits.
_DECIMALS = 9


@dataclass(frozen=True)
class Candidate:
    """A response that may become half of a pair.

    Example: text "left 3, right 5, 3+5=8</think>\\boxed{8}", total 1.2, correct, finished, well_formed, encodable.
    """

    text: str
    """Without the stop token."""
    total: float
    """Total reward."""
    correct: bool
    """Whether the answer rule found the answer right."""
    finished: bool
    """It ended by itself; False: it was cut at the length limit."""
    well_formed: bool
    """Whether the format rule accepts it."""
    encodable: bool
    """False: its text contains a control token (an image token, the end of a turn), so it cannot be trained on."""
    checked: bool = True
    """False: a check of it hung or crashed, so it is not known whether it is right."""


def choose_pairs(
    candidates: Sequence[Candidate], *, max_pairs: int, min_margin: float, reject_ill_formed: bool
) -> tuple[list[Preference], Counter[str]]:
    """Choose pairs among the responses to one prompt.

    A right response is preferred to a wrong one ("correctness"), and to a right one of lower total reward ("margin").
    Of more than `max_pairs`, those by correctness come first, then those whose responses are in the fewest pairs so
    far, then the larger margins, then the order of the responses: no response dominates, and nothing is drawn.

    Args:
        candidates: the responses, in the order of their sample index.
        min_margin: least difference of the total rewards; it must be above 0 in any case.
        reject_ill_formed: whether cut and ill-formed responses may be rejected ones, rather than left out.

    Returns:
        The pairs, and the numbers of responses, pairs and prompts (0 or 1) dropped, by reason.
    """
    usable, dropped = usable_candidates(candidates, reject_ill_formed=reject_ill_formed)
    pairs: list[tuple[int, int, Preference]] = []
    for (i, chosen), (j, rejected) in product(enumerate(usable), repeat=2):
        if i == j or not can_be_chosen(chosen):
            continue
        if rejected.correct and (rejected.total, j) > (chosen.total, i):
            continue  # product() brings every two responses in both orders
        preference = _preference(chosen, rejected, MARGIN if rejected.correct else CORRECTNESS, min_margin)
        if preference is None:
            dropped["pair/no_margin"] += 1
        else:
            pairs.append((i, j, preference))
    kept = _spread(pairs, max_pairs)
    dropped["pair/over_limit"] += len(pairs) - len(kept)
    if not pairs:
        dropped[f"prompt/{_no_pair_reason(usable)}"] += 1
    return kept, +dropped


def usable_candidates(
    candidates: Sequence[Candidate], *, reject_ill_formed: bool
) -> tuple[list[Candidate], Counter[str]]:
    """Leave out responses that no pair may hold: empty, not encodable, unchecked, duplicate, cut, ill-formed.

    Args:
        reject_ill_formed: keep cut and ill-formed ones, which then can be rejected but never chosen.

    Returns:
        The usable ones in their order, and the numbers dropped by reason (`response/*`).
    """
    usable: dict[str, Candidate] = {}
    dropped: Counter[str] = Counter()
    for candidate in candidates:
        reason = _unusable_reason(candidate, reject_ill_formed)
        if reason is None and candidate.text in usable:
            # Two pairs of the same two texts would train on one comparison twice.
            reason = "duplicate"
        if reason is None:
            usable[candidate.text] = candidate
        else:
            dropped[f"response/{reason}"] += 1
    return list(usable.values()), dropped


def can_be_chosen(candidate: Candidate) -> bool:
    """Return whether a response may be preferred: right, finished, well-formed, not empty, and encodable."""
    return candidate.correct and _unusable_reason(candidate, reject_ill_formed=False) is None


def best_chosen(candidates: Sequence[Candidate]) -> int | None:
    """Return the index of the response with the highest total, the first of equals; None if none can be chosen."""
    fit = [index for index, candidate in enumerate(candidates) if can_be_chosen(candidate)]
    return max(fit, key=lambda index: (candidates[index].total, -index), default=None)


def dropout_ntp_pair(
    chosen: Candidate, continued: Candidate, *, min_margin: float, reject_ill_formed: bool
) -> tuple[Preference | None, Counter[str]]:
    """Make a pair of a response and its first half continued without the image (DropoutNTP of InternVL's MMPR).

    MMPR rejects every such continuation, because it has no answers to check them by. Here they are scored: one that is
    as good as the chosen response makes no pair.

    Args:
        chosen: a response for which `can_be_chosen` holds.
        min_margin: least difference of the total rewards; it must be above 0 in any case.
        reject_ill_formed: whether a cut or ill-formed continuation may be rejected, rather than left out.

    Returns:
        The pair or None, and the number dropped by reason (`dropout_ntp/*`).
    """
    reason = _unusable_reason(continued, reject_ill_formed)
    if continued.text == chosen.text:
        reason = "duplicate"
    pair = None if reason else _preference(chosen, continued, DROPOUT_NTP, min_margin)
    if pair is None:
        return None, Counter({f"dropout_ntp/{reason or 'no_margin'}": 1})
    return pair, Counter()


def is_sampled(prompt_key: str, fraction: float, *, seed: int) -> bool:
    """Return whether a prompt belongs to a random fraction (0 to 1) of all prompts, by its key and the seed alone."""
    # A hash instead of a generator: the choice depends neither on the order of the prompts nor on the number of ranks.
    digest = hashlib.blake2b(f"{seed}|dropout_ntp|{prompt_key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def _unusable_reason(candidate: Candidate, reject_ill_formed: bool) -> str | None:
    if not candidate.text.strip():
        return "empty"
    if not candidate.encodable:
        return "control_token"
    if not candidate.checked:
        return "unchecked"
    if not candidate.finished and not reject_ill_formed:
        return "cut"
    if not candidate.well_formed and not reject_ill_formed:
        return "ill_formed"
    return None


def _preference(chosen: Candidate, rejected: Candidate, source: str, min_margin: float) -> Preference | None:
    # A pair without a margin teaches noise, even where min_margin is 0.
    margin = round(chosen.total - rejected.total, _DECIMALS)
    if margin <= 0 or margin < min_margin:
        return None
    return Preference(chosen.text, rejected.text, margin, source)


def _spread(pairs: Sequence[tuple[int, int, Preference]], limit: int) -> list[Preference]:
    """Take pairs one by one, each time the best of the remaining ones."""
    # One by one, since each pair that is taken changes how often its two responses were used. Groups have 8 or 16
    # responses, so the quadratic cost does not matter.
    left = list(pairs)
    kept: list[Preference] = []
    used: Counter[int] = Counter()
    while left and len(kept) < limit:
        best = min(
            left, key=lambda pair: (pair[2].source != CORRECTNESS, used[pair[0]] + used[pair[1]], -_margin(pair[2]))
        )
        left.remove(best)
        kept.append(best[2])
        used.update(best[:2])
    return kept


def _margin(preference: Preference) -> float:
    assert preference.margin is not None
    return preference.margin


def _no_pair_reason(usable: Sequence[Candidate]) -> str:
    """Return the reason why a prompt with these usable responses has no pair."""
    if not usable:
        return "no_usable_response"
    right = [candidate for candidate in usable if candidate.correct]
    if not right:
        return "all_wrong"
    if not any(can_be_chosen(candidate) for candidate in right):
        return "none_well_formed"
    return "all_right" if len(right) == len(usable) else "no_margin"
