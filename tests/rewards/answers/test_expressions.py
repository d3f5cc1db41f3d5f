import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.rewards.answers.expressions import (
    equations_agree,
    expressions_agree,
    inequalities_agree,
    parse,
    value_of,
)


@pytest.mark.parametrize(
    ("given_text", "reference", "equal"),
    [
        ("(x+1)^2", "x^2+2x+1", True),
        ("x^2+1", "x^2+2x+1", False),
        ("a", "A", False),
        ("|x|", "x", False),
        (r"\sqrt{x^2}", "x", False),
        (r"\ln(xy)", r"\ln x+\ln y", True),
        (r"2\ln x", r"\ln(x^2)", True),
        (r"\frac{1}{2006!}", r"\frac{1}{2004!}", False),
        (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}", False),
        (r"\sqrt{2}\times10^{-9}", r"\sqrt{3}\times10^{-9}", False),
        ("1.2e-19x", "1.3e-19x", False),
        (r"x+10^{-12}", "x", False),
        ("3.14159", r"\pi", True),
        ("3.1416", r"\pi", False),
        (r"\pi", "3.14159", True),
        ("1/2x", r"\frac{x}{2}", True),
        (r"\sin30^\circ", r"\frac{1}{2}", True),
        ("2+3i", "3i+2", True),
        ("i^2", "-1", True),
        ("y'", "y", False),
        (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}", True),
        (r"\sum_{k=1}^{n} k", "x", False),
        ("f(x)", "g(x)", False),
        ("x+", "x", False),
        (r"\infty", r"\infty", True),
        (r"-\infty", r"\infty", False),
        (r"\frac{1}{0}", r"\frac{2}{0}", False),
        ("x", "", False),
        (r"0.\overline{3}x", r"\frac{x}{3}", True),
    ],
)
def test_expressions(given_text, reference, equal):
    assert expressions_agree(given_text, reference) is equal


polynomials = st.lists(st.integers(-9, 9), min_size=2, max_size=4)


def _sum(coefficients):
    return "+".join(f"({value})x^{power}" for power, value in enumerate(coefficients)) or "0"


@given(polynomials, st.data())
@settings(max_examples=30, deadline=None)
def test_a_polynomial_in_another_order_is_the_same_and_with_another_coefficient_is_not(coefficients, data):
    terms = [f"({value})x^{power}" for power, value in enumerate(coefficients)]
    shuffled = "+".join(data.draw(st.permutations(terms)))
    assert expressions_agree(shuffled, _sum(coefficients))
    place = data.draw(st.integers(0, len(coefficients) - 1))
    changed = [*coefficients[:place], coefficients[place] + 1, *coefficients[place + 1 :]]
    assert not expressions_agree(_sum(changed), _sum(coefficients))


@pytest.mark.parametrize(
    ("given_sides", "reference", "equal"),
    [
        (("2x+3y", "6"), ("4x+6y", "12"), True),
        (("6", "2x+3y"), ("2x+3y", "6"), True),
        (("x^2-1", "0"), ("(x-1)(x+1)", "0"), True),
        (("2x+3y", "6"), ("2x+3y", "7"), False),
        (("x", "1"), ("y", "1"), False),
        (("x", ""), ("x", "1"), False),
    ],
)
def test_equations(given_sides, reference, equal):
    assert equations_agree(given_sides, reference) is equal


@pytest.mark.parametrize(
    ("given_sides", "reference", "equal"),
    [(("2x", "2"), ("x", "1"), True), (("-x", "-1"), ("x", "1"), False), (("x", "2"), ("x", "1"), False)],
)
def test_inequalities(given_sides, reference, equal):
    assert inequalities_agree(given_sides, reference) is equal


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\frac{7}{2}", 3.5),
        (r"\sqrt{16}", 4.0),
        ("x", None),
        ("i", None),
        (r"\infty", None),
        ("10^{999}", None),
        ("", None),
    ],
)
def test_values(text, value):
    assert value_of(text) == value


def test_what_is_not_read_whole_is_not_read():
    assert parse("x )") is None
    assert parse("2 &") is None
    assert parse("9**9**9") is None
    assert parse("1+" * 1500 + "1") is None
