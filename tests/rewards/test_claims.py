import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1v2.rewards.claims import (
    HallucinationCounts,
    compile_claim_pattern,
    consistency_score,
    find_claims,
    hallucination_counts,
    judge_claims,
)

PATTERN = r"(?P<name>left|right) (?P<value>\d)"


def test_find_claims_in_order_and_with_repeats():
    text = r"right 5, left 3, no: left 4</think>\boxed{8}"
    assert find_claims(text, PATTERN) == (("right", "5"), ("left", "3"), ("left", "4"))
    assert find_claims("nothing seen", PATTERN) == ()
    assert find_claims("left 3\x00right 5" + "{" * 1000, PATTERN) == (("left", "3"), ("right", "5"))
    assert find_claims("left 3", "") == ()


def test_a_branch_without_a_value_makes_no_claim():
    assert find_claims("left 3, right", r"(?P<name>left) (?P<value>\d)|right") == (("left", "3"),)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(?P<name>left", "reward.claim_pattern=.* is not a regular expression"),
        ("(?P<name>left) 3", "reward.claim_pattern=.* lacks the named group.s. value"),
        (r"(left) (\d)", "lacks the named group.s. name, value"),
    ],
)
def test_a_wrong_pattern_names_the_setting(pattern, message):
    with pytest.raises(ValueError, match=message):
        find_claims("left 3", pattern)


def test_the_empty_pattern_looks_for_nothing():
    assert compile_claim_pattern("") is None


def test_judge_claims():
    claims = (("left", "3"), ("Left ", " 4"), ("middle", "1"), ("right", "Fox"))
    assert judge_claims(claims, {"left": "3", "right": "fox"}) == (True, False, None, True)
    assert judge_claims(claims, {}) == (None, None, None, None)


@pytest.mark.parametrize(
    ("claims", "score"),
    [
        ((("left", "3"), ("right", "5")), 1.0),
        ((("left", "3"),), 1.0),
        ((("left", "3"), ("middle", "9")), 1.0),  # a claim that cannot be judged says nothing
        ((("left", "3"), ("right", "6")), 0.0),
        ((("left", "3"), ("left", "4")), 0.0),  # one of two contradicting claims is false
        ((("left", "3"),) * 9 + (("right", "6"),), 0.0),  # padding does not make up for it
        ((), 0.0),  # silence is no way out
        ((("middle", "9"),), 0.0),
    ],
)
def test_consistency(claims, score):
    assert consistency_score(claims, {"left": "3", "right": "5"}) == score


def test_counts_and_rates():
    facts = {"left": "3", "right": "5"}
    counts = hallucination_counts(
        [
            (("left", "3"), ("right", "4")),  # one of two contradicts
            (("middle", "1"),),  # a claim, but none that can be judged: not covered
            (),
            (("left", "3"),),
            (("left", "9"),),  # a prompt without facts
        ],
        [facts, facts, facts, facts, {}],
    )
    assert counts == HallucinationCounts(claims=3, contradicted=1, unknown=2, responses=4, responses_with_claims=2)
    assert counts.rate == pytest.approx(1 / 3)
    assert counts.coverage == 0.5


def test_no_claims_is_not_no_hallucination():
    counts = hallucination_counts([(), ()], [{"left": "3"}] * 2)
    assert counts.rate is None
    assert counts.coverage == 0.0
    assert hallucination_counts([], []).coverage is None


def test_as_many_facts_as_responses_are_needed():
    with pytest.raises(ValueError, match="zip"):
        hallucination_counts([()], [])


@given(st.lists(st.tuples(st.sampled_from(["left", "right"]), st.sampled_from("0123456789"))))
def test_what_is_written_is_found_and_judged(claims):
    facts = {"left": "3", "right": "5"}
    found = find_claims(", ".join(f"{name} {value}" for name, value in claims), PATTERN)
    assert found == tuple(claims)
    assert judge_claims(found, facts) == tuple(facts[name] == value for name, value in claims)
