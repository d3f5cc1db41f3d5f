"""Estimates from repeated responses to the same prompts: Pass@k, maj@k and their confidence intervals; pure."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

CONFIDENCE = 0.95
_RESAMPLES = 10_000
_RESAMPLES_AT_ONCE = 200
# Up to here every subset of k responses is counted; beyond, an even sample of them is.
_MAX_SUBSETS = 2000


def pass_at_k(num_responses: int, num_correct: int, k: int) -> float:
    """Return the chance that at least one of k responses is right: 1 - C(n - c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), equation 1; k = 1 gives c / n.

    Args:
        num_responses: n, to one prompt.
        num_correct: c of them.

    Raises:
        ValueError: not 1 <= k <= n, or not 0 <= c <= n.
    """
    if not 1 <= k <= num_responses or not 0 <= num_correct <= num_responses:
        raise ValueError(f"Pass@{k} of {num_responses} responses, {num_correct} right: needs 1 <= k <= n, 0 <= c <= n")
    return 1.0 - math.comb(num_responses - num_correct, k) / math.comb(num_responses, k)


def majority_at_k(votes: Sequence[str | None], right: frozenset[str], k: int) -> float:
    """Return the chance that the answer most of k responses agree on is right.

    The mean over all subsets of k of the n responses (over 2000 of them where there are more). Responses without an
    answer do not vote; where several answers have most votes, each is taken equally often; no vote at all is wrong.

    Args:
        votes: the answer of each response; None: it has none. Equal answers are equal text.

    Raises:
        ValueError: not 1 <= k <= n.
    """
    if not 1 <= k <= len(votes):
        raise ValueError(f"maj@{k} of {len(votes)} responses: needs 1 <= k <= n")
    answers = sorted({vote for vote in votes if vote is not None})
    voted_for_VA = numpy.array([[vote == answer for answer in answers] for vote in votes], dtype=numpy.int64)
    counts_SA = _subsets_SV(len(votes), k) @ voted_for_VA
    most_S1 = counts_SA.max(axis=1, keepdims=True, initial=0)
    winners_SA = (counts_SA == most_S1) & (most_S1 > 0)
    won_S = winners_SA[:, [answer in right for answer in answers]].sum(axis=1)
    return statistics.fmean((won_S / numpy.maximum(winners_SA.sum(axis=1), 1)).tolist())


@functools.lru_cache(maxsize=16)
def _subsets_SV(num_votes: int, k: int) -> NDArray[numpy.int64]:
    """Return the subsets of k votes, a row of zeros and ones each; an even sample where there are too many."""
    subsets: Sequence[Sequence[int]]
    if math.comb(num_votes, k) <= _MAX_SUBSETS:
        subsets = list(itertools.combinations(range(num_votes), k))
    else:
        generator = numpy.random.default_rng(0)
        subsets = [generator.permutation(num_votes)[:k].tolist() for _ in range(_MAX_SUBSETS)]
    members_SV = numpy.zeros((len(subsets), num_votes), dtype=numpy.int64)
    numpy.put_along_axis(members_SV, numpy.array(subsets), 1, axis=1)
    members_SV.flags.writeable = False  # kept for the next prompt
    return members_SV


def confidence_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean over prompts by a cluster bootstrap.

    Responses to one prompt are alike, so prompts are drawn: n of n with replacement, 10,000 times with
    fixed random numbers; the interval goes from the 2.5th to the 97.5th percentile of the means (Efron 1979). It covers
    the choice of prompts and the sampling of the responses at once. Where all prompts have one value (all right, say)
    it has no width: that says nothing of other prompts.

    Args:
        values: one for each prompt, such as the part of its responses that are right.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a confidence interval needs at least one prompt")
    generator = numpy.random.default_rng(0)
    # Sorted, so that the order of the prompts changes no bit.
    ordered = numpy.sort(numpy.asarray(values, dtype=numpy.float64))
    # In parts: all draws at once would take gigabytes for a large benchmark.
    means = [
        generator.choice(ordered, size=(_RESAMPLES_AT_ONCE, len(ordered))).mean(axis=1)
        for _ in range(_RESAMPLES // _RESAMPLES_AT_ONCE)
    ]
    tail = 50 * (1 - CONFIDENCE)
    low, high = numpy.percentile(numpy.concatenate(means), [tail, 100 - tail])
    return float(low), float(high)


def budgets(num_responses: int) -> list[int]:
    """Return the values of k for Pass@k and maj@k: powers of two above 1, and the number of responses."""
    powers = [2**exponent for exponent in range(1, num_responses.bit_length()) if 2**exponent < num_responses]
    return [*powers, num_responses] if num_responses > 1 else []
