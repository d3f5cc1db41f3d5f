"""The choice of pairs: worked out by hand, and properties that hold for any responses."""

from __future__ import annotations

from collections import Counter
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1v2.rl.preference_pairs import (
    Candidate,
    best_chosen,
    can_be_chosen,
    choose_pairs,
    dropout_ntp_pair,
    is_sampled,
)


def candidate(text: str, total: float, *, correct: bool | None = None, **flags: bool) -> Candidate:
    """Return a response; right ones have a total of 1 or more unless told otherwise."""
    fields = {"finished": True, "well_formed": True, "encodable": True} | flags
    return Candidate(text, total, total >= 1 if correct is None else correct, **fields)


def choose(*candidates: Candidate, max_pairs: int = 10, min_margin: float = 0.0, reject_ill_formed: bool = False):
    pairs, dropped = choose_pairs(
        candidates, max_pairs=max_pairs, min_margin=min_margin, reject_ill_formed=reject_ill_formed
    )
    return [(pair.chosen, pair.rejected, pair.margin, pair.source) for pair in pairs], dict(dropped)


def test_right_is_chosen_over_wrong_and_then_better_over_worse() -> None:
    pairs, dropped = choose(candidate("a", 1.2), candidate("b", 1.0), candidate("c", 0.2))
    assert pairs == [
        ("a", "c", 1.0, "correctness"),
        ("b", "c", 0.8, "correctness"),
        ("a", "b", 0.2, "margin"),
    ]
    assert dropped == {}


def test_a_wrong_response_is_never_chosen_however_well_rewarded() -> None:
    pairs, dropped = choose(candidate("a", 1.0), candidate("b", 3.0, correct=False))
    assert pairs == []
    assert dropped == {"pair/no_margin": 1, "prompt/no_margin": 1}


def test_the_margin_bound_is_inclusive_in_spite_of_rounding() -> None:
    assert 1.2 - 1.0 < 0.2
    assert choose(candidate("a", 1.2), candidate("b", 1.0), min_margin=0.2)[0] == [("a", "b", 0.2, "margin")]
    pairs, dropped = choose(candidate("a", 1.2), candidate("b", 1.0), min_margin=0.21)
    assert (pairs, dropped) == ([], {"pair/no_margin": 1, "prompt/all_right": 1})


def test_pairs_share_out_the_responses() -> None:
    right = [candidate(f"r{i}", 1.0) for i in range(3)]
    wrong = [candidate(f"w{i}", 0.0) for i in range(3)]
    pairs, dropped = choose(*right, *wrong, max_pairs=3)
    assert [pair[:2] for pair in pairs] == [("r0", "w0"), ("r1", "w1"), ("r2", "w2")]
    assert dropped == {"pair/over_limit": 6, "pair/no_margin": 3}


@pytest.mark.parametrize(
    ("flags", "text", "reason"),
    [
        ({}, " \n", "empty"),
        ({"encodable": False}, "x", "control_token"),
        ({"finished": False}, "x", "cut"),
        ({"well_formed": False}, "x", "ill_formed"),
        ({}, "good", "duplicate"),
    ],
)
def test_unusable_responses_are_counted_by_reason(flags: dict[str, bool], text: str, reason: str) -> None:
    pairs, dropped = choose(candidate("good", 1.0), candidate(text, 0.0, **flags))
    assert pairs == []
    assert dropped == {f"response/{reason}": 1, "prompt/all_right": 1}


@pytest.mark.parametrize("flag", ["finished", "well_formed"])
def test_cut_and_ill_formed_responses_may_be_rejected_but_never_chosen(flag: str) -> None:
    good, bad = candidate("good", 1.0), candidate("bad", 0.0, **{flag: False})
    assert choose(good, bad, reject_ill_formed=True)[0] == [("good", "bad", 1.0, "correctness")]
    best = candidate("best", 2.0, **{flag: False})
    assert choose(best, good, candidate("w", 0.0), reject_ill_formed=True)[0] == [("good", "w", 1.0, "correctness")]
    assert choose(best, candidate("w", 0.0), reject_ill_formed=True)[1] == {"prompt/none_well_formed": 1}


def test_why_a_prompt_has_no_pair() -> None:
    assert choose(candidate("a", 0.0), candidate("b", 0.2))[1] == {"prompt/all_wrong": 1}
    assert choose(candidate("a", 1.0), candidate("b", 1.0))[1] == {"pair/no_margin": 1, "prompt/all_right": 1}
    assert choose(candidate("", 1.0))[1] == {"response/empty": 1, "prompt/no_usable_response": 1}
    # Pairs that the limit takes away were there: the prompt is not to blame.
    assert choose(candidate("a", 1.0), candidate("b", 0.0), max_pairs=0)[1] == {"pair/over_limit": 1}


def test_the_best_fit_response_is_continued() -> None:
    group = [candidate("a", 1.0), candidate("b", 1.2), candidate("c", 1.2), candidate("d", 9.0, finished=False)]
    assert best_chosen(group) == 1
    assert best_chosen([candidate("a", 0.0), candidate("b", 1.0, encodable=False)]) is None


def test_a_continuation_that_is_as_good_makes_no_pair() -> None:
    chosen = candidate("left 3 right 5", 1.2)

    def pair(continued: Candidate, **settings: object):
        return dropout_ntp_pair(chosen, continued, **({"min_margin": 0.0, "reject_ill_formed": False} | settings))

    found, dropped = pair(candidate("left 3 right 6", 0.2))
    assert found is not None
    assert (found.margin, found.source) == (1.0, "dropout_ntp")
    assert not dropped
    assert pair(candidate("left 3 right 5 ", 1.2)) == (None, Counter({"dropout_ntp/no_margin": 1}))
    assert pair(candidate("left 3 right 5", 0.0)) == (None, Counter({"dropout_ntp/duplicate": 1}))
    assert pair(candidate("left", 0.0, finished=False)) == (None, Counter({"dropout_ntp/cut": 1}))
    assert pair(candidate("left", 0.0, finished=False), reject_ill_formed=True)[0] is not None
    assert pair(candidate("left", 0.0), min_margin=1.3)[1] == {"dropout_ntp/no_margin": 1}


def test_the_drawn_part_of_the_prompts_is_as_large_as_asked_and_grows() -> None:
    keys = [f"digits-{index}" for index in range(4000)]
    quarter = {key for key in keys if is_sampled(key, 0.25, seed=1)}
    assert 900 < len(quarter) < 1100
    assert quarter < {key for key in keys if is_sampled(key, 0.5, seed=1)}
    assert quarter != {key for key in keys if is_sampled(key, 0.25, seed=2)}
    assert all(is_sampled(key, 1.0, seed=1) for key in keys)
    assert not any(is_sampled(key, 0.0, seed=1) for key in keys)


candidates = st.lists(
    st.builds(
        Candidate,
        text=st.sampled_from(["", " ", *"abcdefgh"]),
        total=st.sampled_from([0.0, 0.2, 0.3, 1.0, 1.1, 1.2]),
        correct=st.booleans(),
        finished=st.booleans(),
        well_formed=st.booleans(),
        encodable=st.booleans(),
    ),
    max_size=12,
)


@given(candidates, st.integers(0, 6), st.sampled_from([0.0, 0.1, 0.9]), st.booleans())
def test_whatever_the_responses(group: list[Candidate], limit: int, min_margin: float, keep: bool) -> None:
    pairs, dropped = choose_pairs(group, max_pairs=limit, min_margin=min_margin, reject_ill_formed=keep)
    first = {}
    for response in group:
        if response.encodable and (keep or (response.finished and response.well_formed)):
            first.setdefault(response.text, response)
    assert len(pairs) <= limit
    assert len({(pair.chosen, pair.rejected) for pair in pairs}) == len(pairs)
    for pair in pairs:
        chosen, rejected = first[pair.chosen], first[pair.rejected]
        assert can_be_chosen(chosen)
        assert pair.rejected.strip()
        assert rejected.correct == (pair.source == "margin")
        assert pair.margin == pytest.approx(chosen.total - rejected.total)
        assert pair.margin > 0
        assert pair.margin >= min_margin
    usable = len(group) - sum(count for name, count in dropped.items() if name.startswith("response/"))
    assert len(pairs) + dropped["pair/no_margin"] + dropped["pair/over_limit"] <= comb(usable, 2)
    assert sum(count for name, count in dropped.items() if name.startswith("prompt/")) == (
        0 if pairs or dropped["pair/over_limit"] else 1
    )
    assert all(count > 0 for count in dropped.values())
    again = choose_pairs(group, max_pairs=limit, min_margin=min_margin, reject_ill_formed=keep)
    assert again == (pairs, dropped)


def test_a_response_whose_check_failed_is_in_no_pair() -> None:
    pairs, dropped = choose(candidate("a", 1.2), candidate("b", 0.2, checked=False), candidate("c", 1.3, checked=False))
    assert pairs == []
    assert dropped == {"response/unchecked": 2, "prompt/all_right": 1}
