r"""Numbers with or without a unit: `8`, `8 cm`, `\$8`, `60^\circ`, `30%`, `5 million` (rules 4 to 9).

Standard library only: the verifier workers import this. Texts are from `normalise`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from megatron_r1v2.rewards.answers.numbers import Number, numbers_equal, read_number
from megatron_r1v2.rewards.answers.units import Unit, is_attached_unit, is_symbol, read_unit

_MAX_QUANTITY_CHARACTERS = 120
_MONEY = re.compile(
    r"([+-]?)\s*(\\\$|[\u20ac\u00a3\u00a5\u20b9]|Rs\b|USD|EUR|GBP|INR|RMB|CNY)\.?\s*([+-]?[\d.].*)", re.DOTALL
)
_UNIT_START = re.compile(r"\\frac(?=\{[A-Za-z])|\^\\circ|%|\\\$|\\mu|\\Omega|(?<![A-Za-z\\{^_])[A-Za-z]|[^\x00-\x7f]")
_MAX_STARTS = 6
_UNIT_IN_BRACKETS = re.compile(r"(?<=\d)\s*\(([A-Za-z^\x80-\uffff][^()\d]*(?:\^\d)?)\)$")
_AFTER_DECIMALS = frozenset("NJWVA")
_MAGNITUDES = {
    "hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12,
    "\u767e": 2, "\u5343": 3, "\u4e07": 4, "\u4ebf": 8,
}  # fmt: skip
_MAGNITUDE = re.compile(rf"\s*({'|'.join(_MAGNITUDES)})(?![A-Za-z\u514b\u7c73])\s*", re.IGNORECASE)


class Quantity(NamedTuple):
    """A number and its unit.

    Example: "8 cm" is Quantity(Number(Fraction(8)), Unit({"length": 1}, Fraction(1, 100))).
    """

    number: Number
    unit: Unit | None = None


def read_quantity(text: str, *, attached: bool = False) -> Quantity | None:
    """Return the number with its unit that a text is, or None for anything else.

    Args:
        attached: whether one letter directly behind a digit may be a unit (rule 5): true of a response's answer, false
            of a reference, where `2m` is two times m.
    """
    if len(text) > _MAX_QUANTITY_CHARACTERS:
        return None
    if (match := _UNIT_IN_BRACKETS.search(text)) and is_symbol(match[1]):
        text = f"{text[: match.start()]} {match[1]}"
    if (number := read_number(text)) is not None:
        return Quantity(number)
    if match := _MONEY.fullmatch(text):
        quantity = read_quantity(match[1] + match[3], attached=attached)
        unit = read_unit(match[2])
        is_money = quantity is not None and quantity.unit in (None, unit)
        return quantity._replace(unit=unit) if quantity is not None and is_money else None
    for start in [match.start() for match in _UNIT_START.finditer(text)][:_MAX_STARTS]:
        number = read_number(text[:start])
        if number is None:
            continue
        rest = text[start:]
        if magnitude := _MAGNITUDE.match(rest):
            scale = Fraction(10) ** _MAGNITUDES[magnitude[1].lower()]
            number, rest = Number(number.value * scale, number.digits), rest[magnitude.end() :]
            if not rest:
                return Quantity(number)
        elif text[start - 1] != " " and not _is_unit_behind(text[:start], rest, attached=attached):
            continue
        unit = read_unit(rest)
        return None if unit is None else Quantity(number, unit)
    return None


def _is_unit_behind(number: str, letters: str, *, attached: bool) -> bool:
    """Return whether letters directly behind a number are a unit, and no variable to multiply it by (rule 5)."""
    # A product of decimals and a capital letter is rare, 0.64N is not.
    decimal = "." in number and letters in _AFTER_DECIMALS
    return decimal or is_attached_unit(letters) or (attached and is_symbol(letters))


def quantities_equal(given: Quantity, reference: Quantity, tolerance: float = 0.0) -> bool:
    """Return whether two quantities are the same: rule 6 for units, 8 for percent, 9 for numbers.

    Args:
        tolerance: relative, for the numbers.
    """
    left, right = given.unit, reference.unit
    if left is not None and right is not None and left.dimensions and right.dimensions:
        if left.dimensions != right.dimensions:
            return False
        return numbers_equal(_scaled(given.number, left.factor), _scaled(reference.number, right.factor), tolerance)
    if numbers_equal(given.number, reference.number, tolerance):
        return True
    # 30% is also the value 0.3.
    hundredth = Fraction(1, 100)
    as_values = (
        _scaled(given.number, hundredth) if left is not None and left.is_percent else given.number,
        _scaled(reference.number, hundredth) if right is not None and right.is_percent else reference.number,
    )
    return as_values != (given.number, reference.number) and numbers_equal(*as_values, tolerance)


def _scaled(number: Number, factor: Fraction) -> Number:
    return Number(number.value * factor, number.digits)
