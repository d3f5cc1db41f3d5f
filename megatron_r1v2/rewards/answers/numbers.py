r"""Numbers as people write them, read to the exact value: 8, -1,234.5, 1e-3, 1.6\times10^{-19}, 3/4, 2\frac{1}{2}.

Standard library only: the verifier workers import this. Texts are from `normalise`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

# Nobody gives a longer number, and exact arithmetic on it would cost quadratic time.
MAX_NUMBER_CHARACTERS = 64
# A decimal of this many digits is a value that was computed, not one that was guessed or rounded (rule 9).
ROUNDED_DIGITS = 6

_SIGN = r"[+-]?"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_TIMES_TEN = r"\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*"
_EXPONENT = r"(?:\{(?P<braced>[+-]?\d{1,3})\}|(?P<bare>-?\d{1,3}))"
_POWER = rf"(?:[eE](?P<e>[+-]?\d{{1,3}})|{_TIMES_TEN}{_EXPONENT}(?!\d))"
_PLAIN = re.compile(rf"(?P<sign>{_SIGN})\s*(?P<decimal>{_DECIMAL})(?:{_POWER})?", re.ASCII)
_POWER_OF_TEN = re.compile(
    rf"(?P<sign>{_SIGN})\s*10\s*\^\s*(?:\{{(?P<braced>[+-]?\d{{1,3}})\}}|(?P<bare>-?\d{{1,3}}))", re.ASCII
)
_REPEATING = re.compile(
    rf"(?P<sign>{_SIGN})(?P<whole>\d+)\.(?P<fixed>\d*)(?:\\(?:overline|bar|dot)\{{?(?P<cycle>\d+)\}}?)", re.ASCII
)
_WHOLE = r"(?:(?P<whole>\d+)(?:\s|\s*(?=\\frac)))?"
_FRACTION = re.compile(
    rf"(?P<sign>{_SIGN})\s*\(?{_WHOLE}\s*(?:\\frac\{{(?P<top>{_SIGN}{_DECIMAL})\}}\{{(?P<bottom>{_SIGN}{_DECIMAL})\}}"
    rf"|(?P<over>{_DECIMAL})\)?\s*/\s*\(?(?P<under>{_SIGN}{_DECIMAL}))\)?",
    re.ASCII,
)


class Number(NamedTuple):
    """A number and how it was written.

    Example: "0.333" is Number(Fraction(333, 1000), digits=3); "1/3" is Number(Fraction(1, 3), digits=None).
    """

    value: Fraction
    digits: int | None = None
    """Significant digits of a decimal, which may be a rounded value; None for whole numbers and fractions."""


def read_number(text: str) -> Number | None:
    """Return the number that a text is, or None for anything else, a division by zero among it."""
    if len(text) > MAX_NUMBER_CHARACTERS:
        return None
    text = text.strip()
    while (
        text[:1] == "("
        and text[-1:] == ")"
        and text.count("(") == text.count(")")
        and text[1:-1].find(")") >= text[1:-1].rfind("(")
    ):
        text = text[1:-1].strip()
    if match := _PLAIN.fullmatch(text):
        return _decimal(match)
    if match := _POWER_OF_TEN.fullmatch(text):
        return Number(_signed(match, Fraction(10) ** int(match["braced"] or match["bare"])))
    if match := _REPEATING.fullmatch(text):
        return Number(_signed(match, _repeating(match)))
    if match := _FRACTION.fullmatch(text):
        return _fraction(match)
    return None


def numbers_equal(given: Number, reference: Number, tolerance: float = 0.0) -> bool:
    """Return whether two numbers are the same by rule 9: whole numbers exactly, others to the tolerance.

    Args:
        tolerance: relative to the reference. 0: exactly, except that a decimal of six digits or more equals the
            fraction that it is cut or rounded from.
    """
    left, right = given.value, reference.value
    if left == right:
        return True
    if left.denominator == 1 and right.denominator == 1:
        return False
    # By way of its text, since the float 1e-6 is not exactly a millionth.
    if abs(left - right) <= Fraction(str(tolerance)) * abs(right):
        return True
    return is_rounded(given, right, endless=has_endless_decimals(right)) or is_rounded(
        reference, left, endless=has_endless_decimals(left)
    )


def is_rounded(decimal: Number, exact: Fraction, *, endless: bool) -> bool:
    """Return whether a decimal of six digits or more is a value with endless decimals, cut or rounded (rule 9).

    Args:
        exact: the value, or one that is exact to far more digits.
        endless: whether the value has endless decimals; a decimal near one that has not is another value.
    """
    if decimal.digits is None or decimal.digits < ROUNDED_DIGITS or decimal.value == 0 or not endless:
        return False
    return abs(decimal.value - exact) < unit_of_last_digit(decimal)


def unit_of_last_digit(decimal: Number) -> Fraction:
    """Return what one step of the last digit that was written is worth: 0.01 for 3.14, and for 12.50.

    Args:
        decimal: a number with digits.
    """
    assert decimal.digits is not None, "whole numbers and fractions are not rounded"
    magnitude, value = 0, abs(decimal.value)
    while value >= 10:
        value, magnitude = value / 10, magnitude + 1
    while 0 < value < 1:
        value, magnitude = value * 10, magnitude - 1
    return Fraction(10) ** (magnitude - decimal.digits + 1)


def _decimal(match: re.Match[str]) -> Number:
    written = match["decimal"].replace(",", "").replace(" ", "")
    power = int(match["e"] or match["braced"] or match["bare"] or 0)
    value = _signed(match, Fraction(written.rstrip(".")) * Fraction(10) ** power)
    digits = len(written.replace(".", "").lstrip("0")) if "." in written.rstrip(".") else None
    return Number(value, digits or None)


def _repeating(match: re.Match[str]) -> Fraction:
    fixed, cycle = match["fixed"], match["cycle"]
    # 0.1\overline{6} = (16 - 1) / 90
    nines = (10 ** len(cycle) - 1) * 10 ** len(fixed)
    return int(match["whole"]) + Fraction(int(fixed + cycle) - int(fixed or "0"), nines)


def _fraction(match: re.Match[str]) -> Number | None:
    top, bottom = (Fraction((part or "").replace(",", "").replace(" ", "") or "0") for part in _parts(match))
    whole = int(match["whole"] or 0)
    if bottom == 0 or (match["whole"] is not None and (top < 0 or bottom < 0)):
        return None
    return Number(_signed(match, whole + top / bottom))


def _parts(match: re.Match[str]) -> tuple[str, str]:
    if match["top"] is not None:
        return match["top"], match["bottom"]
    return match["over"], match["under"]


def _signed(match: re.Match[str], value: Fraction) -> Fraction:
    return -value if match["sign"] == "-" else value


def has_endless_decimals(value: Fraction) -> bool:
    """Return whether a fraction has decimals without end, as 1/3 has and 1/4 has not."""
    denominator = value.denominator
    for factor in (2, 5):
        while denominator % factor == 0:
            denominator //= factor
    return denominator != 1
