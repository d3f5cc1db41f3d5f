"""The rules of docs/rewards.md, one table a kind of reference: the answer, the reference, and whether it is right."""

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from megatron_r1v2.rewards.answers.comparison import answers_agree, texts_equal
from megatron_r1v2.rewards.answers.kinds import Kind, kind_of
from megatron_r1v2.rewards.answers.normalisation import normalise
from tests.rewards.answers.composed_cases import COMPOSED
from tests.rewards.answers.number_cases import NUMBER
from tests.rewards.answers.other_cases import OTHER

CASES = {"NUMBER": NUMBER, **OTHER, **COMPOSED}


@pytest.mark.parametrize(
    ("kind", "given", "reference", "right"),
    [(kind, *case) for kind, cases in CASES.items() for case in cases],
)
def test_an_answer_is_right_by_the_rule_of_the_references_kind(kind, given, reference, right):
    assert kind_of(normalise(reference)) is Kind[kind]
    assert answers_agree(normalise(given), normalise(reference)) is right


@pytest.mark.parametrize("reference", [case[1] for cases in CASES.values() for case in cases])
def test_every_reference_agrees_with_itself_however_it_is_wrapped(reference):
    for wrapped in (f"${reference}$", rf"\boxed{{{reference}}}", f" {reference} ."):
        assert answers_agree(normalise(wrapped), normalise(reference))


def test_every_kind_has_its_cases():
    assert CASES.keys() == {kind.name for kind in Kind}


@pytest.mark.parametrize(
    ("given", "reference", "equal"),
    [("Red  Fox", "red fox", True), ("C_6H_{12}O_6", "C6H12O6", True), ("the cat", "cat", True), ("x^2", "x2", False)],
)
def test_texts(given, reference, equal):
    assert texts_equal(normalise(given), normalise(reference)) is equal


_PIECES = st.sampled_from(
    [*"0123xyABC(){}[],.;:=<>|+-*/_%'", " ", " or ", " and ", " cm", r"\frac", r"\sqrt{2}", r"\pi", r"\pm", r"\in",
     r"\cup", r"\{", r"\}", r"\ldots", r"\le", r"\text{", r"\begin{cases}", r"\\", "to", "\u4e0e", "\u221a"]
)  # fmt: skip


_REFERENCES = st.sampled_from([case[1] for cases in CASES.values() for case in cases])


@drawn(st.lists(_PIECES, max_size=12).map("".join), _REFERENCES)
@settings(max_examples=300, deadline=None)
def test_no_answer_and_no_reference_is_an_error(text, reference):
    answers_agree(normalise(text), normalise(reference))
    answers_agree(normalise(reference + text), normalise(text))
    answers_agree(normalise(text + reference), normalise(reference))


numbers = st.integers(-50, 50).map(str) | st.sampled_from([r"\frac{1}{2}", "0.25", r"\sqrt{2}", r"2\pi", "(1, 2)"])


@drawn(st.lists(numbers, min_size=2, max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_lists_agree_in_any_order_and_sets_whatever_they_repeat(parts, data):
    shuffled = data.draw(st.permutations(parts))
    assert answers_agree(normalise(", ".join(shuffled)), normalise(", ".join(parts)))
    assert answers_agree(normalise(" and ".join(shuffled)), normalise(", ".join(parts)))
    assert not answers_agree(normalise(", ".join([*parts, "51"])), normalise(", ".join(parts)))
    assert not answers_agree(normalise(", ".join(["51", *parts[1:]])), normalise(", ".join(parts)))
    as_set = r"\{" + ", ".join(parts) + r"\}"
    assert answers_agree(normalise(r"\{" + ", ".join([*shuffled, parts[0]]) + r"\}"), normalise(as_set))
    assert not answers_agree(normalise(r"\{51, " + ", ".join(shuffled) + r"\}"), normalise(as_set))
    if len(set(parts)) > 1 and parts != parts[::-1]:
        assert not answers_agree(normalise(f"({', '.join(parts[::-1])})"), normalise(f"({', '.join(parts)})"))


@drawn(st.text(alphabet="ABCDEFGH", min_size=2, max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_letters_in_a_row_agree_in_their_order_only(letters, data):
    shuffled = "".join(data.draw(st.permutations(letters)))
    assert answers_agree(normalise(rf"\text{{{shuffled}}}"), normalise(letters)) is (shuffled == letters)


def test_nothing_agrees_with_nothing():
    assert not answers_agree("", "8")
    assert not answers_agree("8", "")
