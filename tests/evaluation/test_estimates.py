"""Pass@k, maj@k and intervals against values worked out by hand, by counting, and by formula."""

import itertools
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.evaluation.estimates import budgets, confidence_interval, majority_at_k, pass_at_k


def test_pass_at_k_by_hand():
    assert pass_at_k(5, 2, 1) == pytest.approx(2 / 5)
    assert pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)  # of ten triples one avoids both right ones
    assert pass_at_k(4, 0, 4) == 0
    assert pass_at_k(4, 1, 4) == 1


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right, data):
    k = data.draw(st.integers(1, len(right)))
    counted = statistics.fmean(any(subset) for subset in itertools.combinations(right, k))
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(counted)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 4, 1), (3, 1, 0), (3, -1, 1)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(ValueError, match="needs 1 <= k <= n"):
        pass_at_k(n, c, k)


RIGHT = frozenset(["8"])


def test_majority_by_hand():
    assert majority_at_k(["8", "8", "9"], RIGHT, 3) == 1
    assert majority_at_k(["9", "8", "9"], RIGHT, 3) == 0
    assert majority_at_k(["8", "9"], RIGHT, 2) == 0.5  # a tie is broken evenly
    assert majority_at_k(["8", None, None], RIGHT, 3) == 1  # who has no answer does not vote
    assert majority_at_k([None, None], RIGHT, 2) == 0
    # Pairs of (8, 8, 9): one is right, two are tied.
    assert majority_at_k(["8", "8", "9"], RIGHT, 2) == pytest.approx((1 + 0.5 + 0.5) / 3)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["8", "9", None]), min_size=1, max_size=6))
def test_a_majority_of_one_is_pass_at_1(votes):
    assert majority_at_k(votes, RIGHT, 1) == pytest.approx(votes.count("8") / len(votes))


def test_many_subsets_are_sampled_and_come_out_near_the_exact_value():
    votes = ["8"] * 12 + ["9"] * 8
    sampled = majority_at_k(votes, RIGHT, 7)  # C(20, 7) = 77,520
    exact = statistics.fmean(sum(v == "8" for v in s) >= 4 for s in itertools.combinations(votes, 7))
    assert sampled == pytest.approx(exact, abs=0.04)
    assert sampled == majority_at_k(votes, RIGHT, 7)


def test_the_interval_agrees_with_the_normal_one_for_many_prompts():
    values = [0.0] * 240 + [1.0] * 160
    low, high = confidence_interval(values)
    half = 1.96 * (0.4 * 0.6 / 400) ** 0.5
    assert (low, high) == pytest.approx((0.4 - half, 0.4 + half), abs=0.004)


def test_prompts_are_what_is_drawn_not_responses():
    """Five equal responses to each prompt must not make the interval narrower than one each does."""
    values = [0.0, 1.0] * 20
    low, high = confidence_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 40**0.5, abs=0.03)
    assert confidence_interval(values[::-1]) == (low, high)
    assert confidence_interval([1.0, 1.0]) == (1.0, 1.0)


def test_budgets():
    assert [budgets(n) for n in (1, 2, 5, 8)] == [[], [2], [2, 4, 5], [2, 4, 8]]
