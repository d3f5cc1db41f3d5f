"""The kind of a reference: decided from the reference alone, before anything is compared (rule 3).

Standard library only: the verifier workers import this. Texts are from `normalise`.
"""

from __future__ import annotations

import re
from enum import Enum

from megatron_r1v2.rewards.answers.choices import is_label
from megatron_r1v2.rewards.answers.dates import read_date
from megatron_r1v2.rewards.answers.quantities import read_quantity
from megatron_r1v2.rewards.answers.structure import (
    read_brackets,
    read_interval,
    read_matrix,
    split_equation,
    split_list,
    split_name,
    split_plus_minus,
    split_relations,
    split_top,
    split_union,
)


class Kind(Enum):
    """The kinds of answers; docs/rewards.md has the rule of each."""

    NUMBER = "number, with or without unit, or percent"
    EXPRESSION = "expression"
    ASSIGNMENT = "assignment"
    EQUATION = "equation or inequality"
    TUPLE = "ordered tuple"
    LIST = "list of solutions"
    SEQUENCE = "sequence with an ellipsis"
    SET = "set"
    INTERVAL = "interval, or a union of them"
    MATRIX = "matrix"
    RATIO = "ratio"
    NUMERAL = "number in another base"
    CHOICE = "choice"
    DATE = "date, time of day or range"
    TEXT = "text"


_NUMERAL = re.compile(
    r"\(?([0-9A-Za-z]*\d[0-9A-Za-z]*)\)?_\{?(\d+|two|three|four|five|six|seven|eight|nine|ten|twelve|sixteen)\}?"
)
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
          "ten": "10", "twelve": "12", "sixteen": "16"}  # fmt: skip
# Words that mathematics is written in; every other row of letters is text once it is long enough or stands alone.
_FUNCTION_NAMES = (
    "sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan arccot arcsec arccsc arcsinh arccosh arctanh "
    "asin acos atan log ln lg exp max min sup inf gcd lcm det tr arg Re Im sgn mod lim deg dim ker sqrt pi frac binom "
    "alpha beta gamma delta theta lambda sigma omega"
)
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_COMMAND = re.compile(r"\\(?:begin|end)\{[A-Za-z*]+\}(?:\{[lcr| ]+\})?|\\[A-Za-z]+")
_OPERATORS = re.compile(r"[\d+*/^=<>|_\\]")
_FIGURE = re.compile(
    r"\\(?:angle|triangle|odot|overline|overrightarrow|overleftrightarrow|widehat|square|Box|parallelogram|arc)\s*\{?[A-Z][A-Za-z]*'*\}?"
)
# Statements about figures, steps of a proof, reactions of substances.
_PROOF = re.compile(
    r"\\(?:parallel|perp|sim|cong|Rightarrow|Leftrightarrow|therefore|because)(?![a-z])|^[^\\]*[A-Z]\S*\s?\\to(?![a-z])"
)
_SYMBOLS = (
    "He Li Be Ne Na Mg Al Si Cl Ar Ca Sc Ti Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Zr Nb Mo Ag Cd Sn Sb Te Xe Cs "
    "Ba Pt Au Hg Pb Bi Rn Ra Th Pu H B C N O F P S K V Y I W U"
)
_ELEMENTS = frozenset(_SYMBOLS.split())
_ELEMENT = re.compile(r"[A-Z][a-z]?")
_FORMULA = re.compile(r"(?:[A-Z][a-z]?\d*)+(?:\^\d*[+-])?")


# "(C) 12 cm" and "C. x=42"; "E. coli" is a name.
_OPTION = re.compile(r"\([A-Z]\) ?(?:[^\s(,A-Z]|[A-Z][a-z]).*|[A-Z][.)](?! ?[a-z]{3}| ?[A-Z]\b).+", re.DOTALL)


_LABEL = r"\((?:[A-Z]|\d{1,2})\)"
_SEVERAL = re.compile(rf"{_LABEL}(?:,? ?(?:and ?)?{_LABEL})+")


def kind_of(reference: str) -> Kind:
    """Return the kind of a reference answer.

    Args:
        reference: from `normalise`, not empty.
    """
    if is_choice(reference):
        return Kind.CHOICE
    if read_date(reference) is not None:
        return Kind.DATE
    if read_numeral(reference) is not None:
        return Kind.NUMERAL
    if read_quantity(reference) is not None:
        return Kind.NUMBER
    if is_text(reference):
        return Kind.TEXT
    if read_matrix(reference) is not None:
        return Kind.MATRIX
    return _kind_of_composed(reference)


def _kind_of_composed(reference: str) -> Kind:
    parts = split_list(reference)
    if len(parts) > 1:
        return _kind_of_list(parts)
    if len(split_union(reference)) > 1 or (read_interval(reference) is not None and read_brackets(reference) is None):
        return Kind.INTERVAL
    brackets = read_brackets(reference)
    if brackets is not None and len(brackets.parts) > 1:
        return _kind_of_brackets(brackets.opening, brackets.closing)
    if brackets is not None and brackets.opening == "{":
        return Kind.INTERVAL if read_interval(reference) is not None else Kind.SET
    if split_name(reference)[0] is not None:
        return Kind.ASSIGNMENT
    if len(split_plus_minus(reference)) > 1:
        return Kind.LIST
    if len(split_equation(reference)) > 1 or len(split_relations(reference)) > 1:
        return Kind.EQUATION
    if len(split_top(reference, ":")) > 1:
        return Kind.RATIO
    return Kind.EXPRESSION


def _kind_of_list(parts: list[str]) -> Kind:
    if any(r"\ldots" in part for part in parts):
        return Kind.SEQUENCE
    if all(read_interval(part) is not None and read_brackets(part) is None for part in parts):
        return Kind.INTERVAL
    letters = all(re.fullmatch(r"[A-Za-z]'?", part) for part in parts)
    # The order of points, of letters and of words is part of the answer.
    return Kind.TEXT if letters or any(is_text(part) for part in parts) else Kind.LIST


def _kind_of_brackets(opening: str, closing: str) -> Kind:
    if opening == "{":
        return Kind.SET
    return Kind.TUPLE if (opening, closing) == ("(", ")") else Kind.INTERVAL


def is_choice(text: str) -> bool:
    """Return whether a text is one option letter, or several in parentheses each."""
    if is_label(text):
        return text.strip("().").isupper()
    if _OPTION.fullmatch(text):
        return True
    return _SEVERAL.fullmatch(text) is not None


def read_numeral(text: str) -> tuple[str, str] | None:
    """Return the digits and the base of `10101_2`, or None for anything else."""
    match = _NUMERAL.fullmatch(text)
    return None if match is None else (match[1].upper().lstrip("0") or "0", _BASES.get(match[2], match[2]))


def is_text(text: str) -> bool:
    """Return whether a text is words, letters in a row, points, or the formula of a substance (rule 18)."""
    if _FIGURE.fullmatch(text) or _PROOF.search(text) or _is_substance(text):
        return True
    bare = _COMMAND.sub(" ", text)
    if any(ord(char) > 127 and char.isalpha() for char in bare) or '"' in bare:
        return True
    rows = [
        row
        for row in re.findall(r"[A-Za-z]+", re.sub(r"_\{[A-Za-z, ]*\}|_[A-Za-z]", "", bare))
        if row not in _FUNCTIONS
    ]
    if any(len(row) > 3 for row in rows):
        return True
    return any(len(row) > 1 for row in rows) and _OPERATORS.search(text) is None and not re.search(r"[(\[]", text)


def _is_substance(text: str) -> bool:
    """Return whether a formula has two elements or more, or one and its number: H_2O and O_2, but neither C nor V."""
    bare = re.sub(r"[_{}()]", "", text)
    elements = _ELEMENT.findall(bare)
    if not _FORMULA.fullmatch(bare) or "(" in re.sub(r"\([A-Z]", "", text) or not _ELEMENTS.issuperset(elements):
        return False
    has_digit = re.search(r"\d", text) is not None
    uppercase = sum(char.isupper() for char in text)
    is_ion = len(elements) == 1 and re.search(r"\^\{?\d*[+-]\}?$", text) is not None
    return (
        is_ion
        or (len(elements) > 1 and has_digit and uppercase > 1)
        or (len(elements) == 1 and text[0] in "HNOF" and text.endswith("2") and "^" not in text)
    )
