from fractions import Fraction

import pytest

from megatron_r1v2.rewards.answers.units import UNITS, Unit, is_attached_unit, is_symbol, read_unit


@pytest.mark.parametrize(
    ("text", "dimensions", "factor"),
    [
        ("m", {"length": 1}, 1),
        ("km", {"length": 1}, 1000),
        ("cm^2", {"length": 2}, "0.0001"),
        ("cm2", {"length": 2}, "0.0001"),
        ("square feet", {"length": 2}, "0.09290304"),
        ("meters squared", {"length": 2}, 1),
        ("cubic cm", {"length": 3}, "0.000001"),
        ("m/s", {"length": 1, "time": -1}, 1),
        ("km/h", {"length": 1, "time": -1}, "5/18"),
        ("miles per hour", {"length": 1, "time": -1}, "1397/3125"),
        ("m s^{-1}", {"length": 1, "time": -1}, 1),
        (r"m\cdot s^{-2}", {"length": 1, "time": -2}, 1),
        (r"\frac{m}{s^2}", {"length": 1, "time": -2}, 1),
        ("J/(kg K)", {"length": 2, "time": -2, "temperature": -1}, 1),
        ("kWh", {"mass": 1, "length": 2, "time": -2}, 3600000),
        ("L", {"length": 3}, "0.001"),
        (r"\mu m", {"length": 1}, "0.000001"),
        (r"k\Omega", UNITS["ohm"].dimensions, 1000),
        ("Hours", {"time": 1}, 3600),
        ("%", {"percent": 1}, 1),
        ("per cent", {"percent": 1}, 1),
        (r"\$", {"dollar": 1}, 1),
        ("cents", {"dollar": 1}, "0.01"),
        (r"^\circ", {"angle": 1}, 1),
        (r"^\circ C", {"celsius": 1}, 1),
        ("\u5398\u7c73", {"length": 1}, "0.01"),
        ("\u5e73\u65b9\u7c73", {"length": 2}, 1),
        ("\u5143", {"yuan": 1}, 1),
        ("\u4e2a", {"\u4e2a": 1}, 1),
        ("apples", {"apple": 1}, 1),
        ("any text", {"any text": 1}, 1),
        ("men", {"men": 1}, 1),
        ("units", {}, 1),
        ("square units", {}, 1),
    ],
)
def test_units(text, dimensions, factor):
    assert read_unit(text) == Unit(dimensions, Fraction(factor))


@pytest.mark.parametrize(
    "text", ["", " ", "x", "xyz", "ab", "km east", "m +", "8", "m=2", "(m", "a" * 61, "/", "cm of water"]
)
def test_what_is_no_unit(text):
    assert read_unit(text) is None


@pytest.mark.parametrize(
    ("text", "attached"), [("cm", True), ("hours", True), ("m", False), ("mg", False), ("xyz", False), ("%", True)]
)
def test_units_behind_a_digit(text, attached):
    assert is_attached_unit(text) is attached


@pytest.mark.parametrize(("text", "symbol"), [("m", True), ("m/s", True), ("mg", True), ("x", False), ("ab", False)])
def test_symbols(text, symbol):
    assert is_symbol(text) is symbol


def test_no_unit_is_worth_nothing():
    assert all(unit.factor > 0 for unit in UNITS.values())
    assert UNITS["%"].is_percent
    assert not UNITS["m"].is_percent
