from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.rewards.answers.normalisation import normalise
from megatron_r1v2.rewards.answers.numbers import (
    Number,
    has_endless_decimals,
    is_rounded,
    numbers_equal,
    read_number,
    unit_of_last_digit,
)
from tests.rewards.answers.spellings import spelled, values


@pytest.mark.parametrize(
    ("text", "value", "digits"),
    [
        ("8", 8, None),
        ("-8", -8, None),
        ("8.", 8, None),
        (".5", "1/2", 1),
        ("-1,234.50", "-1234.5", 6),
        ("1 234 567", 1234567, None),
        ("0.0120", "0.012", 3),
        ("1e-3", "1/1000", None),
        ("1.5E3", 1500, 2),
        (r"1.6\times10^{-19}", "1.6e-19", 2),
        (r"-3\cdot10^4", -30000, None),
        ("2*10^3", 2000, None),
        ("10^{-3}", "1/1000", None),
        ("-10^2", -100, None),
        ("3/4", "3/4", None),
        ("3 / -4", "-3/4", None),
        ("-3/4", "-3/4", None),
        ("(3/4)", "3/4", None),
        (r"\frac{-3}{4}", "-3/4", None),
        (r"\frac{1.5}{2}", "3/4", None),
        (r"2\frac{1}{2}", "5/2", None),
        ("11 5/6", "71/6", None),
        ("-1 1/2", "-3/2", None),
        (r"0.\overline{3}", "1/3", None),
        (r"0.1\overline{6}", "1/6", None),
        (r"-2.\bar{9}", -3, None),
        ("((8))", 8, None),
    ],
)
def test_numbers(text, value, digits):
    assert read_number(text) == Number(Fraction(value), digits)


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "8x", "1,23", "12,34", "1/0", r"\frac{1}{0}", "8 9", "1_0", "1e9999", "8" * 65, "--8", "8-9", "0x8",
        "(8", "8)", "(1)(2)", "nan", "inf", "\u0668", r"\frac{1}{2}{3}", "2 -1/2", "1.2.3", "8!", "8^2", "10^x",
    ],
)  # fmt: skip
def test_what_is_no_number(text):
    assert read_number(text) is None


@given(st.data(), values)
@settings(max_examples=300, deadline=None)
def test_a_number_written_in_two_ways_agrees(data, value):
    first, second = (read_number(normalise(data.draw(spelled(value)))) for _ in range(2))
    assert numbers_equal(first, second)


@given(st.data(), values, values)
@settings(max_examples=300, deadline=None)
def test_two_numbers_do_not(data, first, second):
    if abs(first - second) * 10**5 > abs(second):
        assert not numbers_equal(*(read_number(normalise(data.draw(spelled(value)))) for value in (first, second)))


@pytest.mark.parametrize(
    ("given_number", "reference", "tolerance", "equal"),
    [
        ("1.2345671", "1.2345674", 0.0, False),
        ("1.0000001", "1.0000002", 0.0, False),
        ("1.0000001", "1.0000002", 1e-6, True),
        ("12345679", "12345678", 0.1, False),
        ("0.333333", "1/3", 0.0, True),
        ("0.333334", "1/3", 0.0, True),
        ("0.333335", "1/3", 0.0, False),
        ("0.666666", "2/3", 0.0, True),
        ("0.666667", "2/3", 0.0, True),
        ("0.33333", "1/3", 0.0, False),
        ("1/3", "0.333333", 0.0, True),
        ("1/3", "0.333", 0.0, False),
        ("0.333333", "0.3333333", 0.0, False),
        ("0.2500001", "1/4", 0.0, False),
        ("1e-9", "0", 1.0, False),
        ("0", "0.000001", 0.0, False),
        ("10.5", "10", 0.05, True),
        ("10.51", "10", 0.05, False),
    ],
)
def test_rounding_by_rule_9(given_number, reference, tolerance, equal):
    assert numbers_equal(read_number(given_number), read_number(reference), tolerance) is equal


def test_a_decimal_near_a_value_that_ends_is_another_value():
    decimal = read_number("0.250001")
    assert not is_rounded(decimal, Fraction(1, 4), endless=has_endless_decimals(Fraction(1, 4)))
    assert is_rounded(read_number("3.14159"), Fraction("3.14159265358979"), endless=True)
    assert not is_rounded(read_number("3.14158"), Fraction("3.14159265358979"), endless=True)
    assert not is_rounded(read_number("3"), Fraction("3.14159265358979"), endless=True)


@pytest.mark.parametrize(
    ("text", "unit"),
    [("3.14", "0.01"), ("12.50", "0.01"), ("0.0120", "0.0001"), ("1.6e-19", "1e-20"), ("1234.5", "0.1")],
)
def test_what_the_last_digit_is_worth(text, unit):
    assert unit_of_last_digit(read_number(text)) == Fraction(unit)


@pytest.mark.parametrize(
    ("value", "endless"), [("1/3", True), ("1/4", False), ("7/40", False), ("5/6", True), ("3", False)]
)
def test_decimals_without_end(value, endless):
    assert has_endless_decimals(Fraction(value)) is endless
