from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.rewards.answers.normalisation import normalise
from megatron_r1v2.rewards.answers.numbers import Number
from megatron_r1v2.rewards.answers.quantities import Quantity, quantities_equal, read_quantity
from megatron_r1v2.rewards.answers.units import read_unit
from tests.rewards.answers.spellings import spelled, values


def equal(first, second, tolerance=0.0):
    return quantities_equal(read_quantity(first, attached=True), read_quantity(second), tolerance)


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("8", 8, None),
        ("8 cm", 8, "cm"),
        ("8cm", 8, "cm"),
        (r"\$8", 8, r"\$"),
        (r"-\$8", -8, r"\$"),
        ("\u20ac5", 5, "\u20ac"),
        ("5\u20ac", 5, "\u20ac"),
        (r"60^\circ", 60, r"^\circ"),
        ("30%", 30, "%"),
        ("2 1/2 cups", "5/2", "cups"),
        (r"\frac{1}{2} m", "1/2", "m"),
        ("1.6e-19 C", "1.6e-19", "C"),
        (r"9.8\frac{m}{s^2}", "9.8", "m/s^2"),
        ("5 million", 5000000, None),
        (r"\$5 million", 5000000, r"\$"),
        ("3\u4e07\u5143", 30000, "\u5143"),
        ("12 apples", 12, "apples"),
    ],
)
def test_quantities(text, value, unit):
    quantity = read_quantity(text)
    assert quantity.number.value == Fraction(value)
    assert quantity.unit == (None if unit is None else read_unit(unit))


@pytest.mark.parametrize(
    "text",
    ["", "x", "5x", "5 x", "2m", "2mg", "5 km east", "8 or 9", "8 and 9", "5am", r"4\pi", "cm 8", r"\$", "8" * 200],
)
def test_what_is_no_quantity(text):
    assert read_quantity(text) is None


def test_a_letter_behind_a_digit_is_a_unit_in_an_answer_only():
    assert read_quantity("2m", attached=True) == Quantity(Number(Fraction(2)), read_unit("m"))
    assert read_quantity("2x", attached=True) is None


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("1 km", "1000 m", True),  # rule 6
        ("8 km", "8 m", False),
        ("72 km/h", "20 m/s", True),
        ("60 min", "1 h", True),
        ("50 cents", r"\$0.50", True),
        (r"\$5", "5%", False),
        ("12 apples", "12 oranges", False),
        ("12 apple", "12 apples", True),
        ("8", "8 cm", True),  # rule 7
        ("8 cm", "8", True),
        ("8 units", "8 cm", True),
        ("30%", "30", True),  # rule 8
        ("30%", "0.3", True),
        ("0.3", "30%", True),
        ("3", "30%", False),
        ("30%", "30 cm", False),
    ],
)
def test_units_and_percent(first, second, same):
    assert equal(first, second) is same


def test_the_tolerance_is_relative_to_the_reference_in_its_unit():
    assert equal("1001 m", "1 km", 0.001) is False  # whole numbers of metres
    assert equal("1000.5 m", "1 km", 0.001)
    assert not equal("1002.5 m", "1 km", 0.001)


PAIRS = [("cm", "m", 100), ("m", "km", 1000), ("g", "kg", 1000), ("min", "h", 60), ("mL", "L", 1000),
         ("cents", "dollars", 100), ("mm^2", "cm^2", 100), ("J", "kJ", 1000),
         ("inches", "ft", 12), ("months", "years", 12)]  # fmt: skip


@given(st.data(), values, st.sampled_from(PAIRS))
@settings(max_examples=200, deadline=None)
def test_a_quantity_in_two_units_agrees_and_in_another_one_does_not(data, value, pair):
    small, large, factor = pair
    written = normalise(data.draw(spelled(value * factor))) + f" {small}"
    reference = f"{value} {large}"
    assert equal(written, reference)
    if value:
        assert not equal(f"{value} {small}", reference)
        assert not equal(f"{value * factor + 1} {small}", reference)


@pytest.mark.parametrize(
    ("text", "is_quantity"), [("0.64N", True), ("2.5V", True), ("64N", False), ("0.64x", False), ("0.64NV", False)]
)
def test_a_capital_letter_behind_decimals_is_a_unit(text, is_quantity):
    assert (read_quantity(text) is not None) is is_quantity
