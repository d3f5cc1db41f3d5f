"""The rules of docs/rewards.md, one table a kind of reference: the answer, the reference, and whether it is right."""

import pytest

from megatron_r1v2.rewards.answers.comparison import answers_agree, texts_equal
from megatron_r1v2.rewards.answers.kinds import Kind, kind_of
from megatron_r1v2.rewards.answers.normalisation import normalise
from tests.rewards.answers.number_cases import NUMBER
from tests.rewards.answers.other_cases import OTHER

CASES = {"NUMBER": NUMBER, **OTHER}


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


def test_nothing_agrees_with_nothing():
    assert not answers_agree("", "8")
    assert not answers_agree("8", "")
