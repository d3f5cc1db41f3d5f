r"""The structure of answers: lists, brackets, names before an equals sign, conditions, matrices, plus-minus.

Everything works on text from `normalise`, at the top level only: commas inside brackets belong to what is inside.
Standard library only: the verifier workers import this.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_OPENING = {"(": ")", "[": "]", "{": "}"}
_CLOSING = frozenset(_OPENING.values())
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_BEGIN = re.compile(r"\\begin\{([A-Za-z]+)\*?\}")
_MATRICES = frozenset(("matrix", "pmatrix", "bmatrix", "vmatrix", "Vmatrix", "Bmatrix", "smallmatrix", "array"))
_ROWS = r"\{(?:cases|aligned|gathered)\}"
_CASES = re.compile(rf"(?:\\\{{|\{{)?\\begin{_ROWS}(.*)\\end{_ROWS}", re.DOTALL)
_NUMBER_SET = r"(?:\\mathbb\{[A-Z]\}|[ZNRQ])(?:\^[+*]|_\+)?"
_DOMAIN = re.compile(rf"(?:,|;|,? ?\()\s*(?:where |with |for )?[a-z](?:, ?[a-z])*\s?\\in\s?{_NUMBER_SET}\)?$")
_AND = re.compile(r"\s*(?:\band\b|\bor\b|\u548c|\u6216|\u4e0e)\s*")
# A quantity that is asked for: x, x_1, \theta, f(2), P(A|B), \angle ABC, |AB|, S_{ABC}, m\angle A, \overline{AB}, n+m.
# Possessive, and a space or backslash between two symbols: letters in a row could be split in exponentially many ways.
_SYMBOL = r"(?:\\?[A-Za-z]++(?:\{\\?[A-Za-z]++\})?'*)"
_SCRIPT = r"(?:_(?:\{[^{}=]{1,12}\}|\w|\\[a-z]+))?"
_TERM = rf"(?:\|?{_SYMBOL}{_SCRIPT}(?:(?: |(?=\\)){_SYMBOL}{_SCRIPT})*+(?:\([^()=]{{0,20}}\))?\|?'*)"
_NAME = re.compile(rf"{_TERM}(?: ?(?:[-+/:]|\\cdot|\\times) ?{_TERM}){{0,3}}|\\frac\{{{_TERM}\}}\{{{_TERM}\}}")
_POINT = re.compile(rf"\({_SYMBOL}{_SCRIPT}(?:, ?{_SYMBOL}{_SCRIPT})+\)")
_RELATION = re.compile(r"(\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|\\in(?![a-z])|<|>)")
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


class Bracketed(NamedTuple):
    r"""Comma-separated parts in brackets.

    Example: `(1, 2]` is Bracketed("(", "]", ("1", "2")), `\{1, 2\}` is Bracketed("{", "}", ("1", "2")).
    """

    opening: str
    closing: str
    parts: tuple[str, ...]


class Interval(NamedTuple):
    r"""All numbers between two ends.

    Example: `x > 2` is Interval("2", "\\infty", False, False, name="x").
    """

    low: str
    high: str
    has_low: bool
    has_high: bool
    name: str | None = None


def split_top(text: str, separators: str) -> list[str]:
    """Split a text at single characters outside all brackets; one piece where brackets do not match."""
    pieces, start = [], 0
    for position in _top_level(text, separators):
        pieces.append(text[start:position].strip())
        start = position + 1
    return [*pieces, text[start:].strip()]


def split_list(text: str) -> list[str]:
    """Split a list at commas, semicolons, "and" and "or" outside brackets."""
    if match := _CASES.fullmatch(text):
        text = match[1]
    if r"\begin" not in text:
        text = text.replace(r"\\", ";")
    if points := _named_points(text):
        return points
    pieces = [piece for part in split_top(text, ";") for piece in split_top(part, ",")]
    return [piece for part in pieces for piece in _split_words(part) if piece]


def _named_points(text: str) -> list[str]:
    """Return `(5, 2)` and `(7, 2)` of `p=5, q=2; p=7, q=2`; nothing of a text that gives no two points by name."""
    groups = [split_top(group, ",") for group in split_top(_AND.sub(";", text), ";")]
    points = [dict(map(split_name, group)) for group in groups]
    names = points[0].keys()
    if len(points) < 2 or len(names) < 2 or None in names:
        return []
    if any(point.keys() != names or len(group) != len(names) for point, group in zip(points, groups, strict=True)):
        return []
    # By the alphabet: two texts may give the names in another order.
    return [f"({', '.join(value for _, value in sorted(point.items()))})" for point in points]


def without_domain(text: str) -> str:
    r"""Return `2k\pi` of `2k\pi, k\in\mathbb{Z}`: what a parameter may be goes without saying (rule 10)."""
    return _DOMAIN.sub("", text)


def read_brackets(text: str) -> Bracketed | None:
    r"""Return the parts of a text that is one bracket around parts with commas, or None.

    Args:
        text: from `normalise`; `\langle 1,2\rangle` counts as parentheses.
    """
    text = text.replace(r"\langle", "(").replace(r"\rangle", ")").strip()
    opening, closing = text[:1], text[-1:]
    inside = text[1:-1]
    if text.startswith("\\{") and text.endswith("\\}"):
        opening, closing, inside = "{", "}", text[2:-2]
    elif opening not in ("(", "[") or closing not in (")", "]"):
        return None
    if not _is_balanced(inside):
        return None
    parts = tuple(part for part in split_top(inside, ",;") if part)
    return Bracketed(opening, closing, parts)


def split_name(text: str) -> tuple[str | None, str]:
    r"""Return the name that a value is given (None where it has none) and the value.

    `x = 8` and `8 = x` name x; `m+n = 33` names m+n; `x^2 + y^2 = 1` and `2x + 3y = 6` are equations.
    """
    sides = _sides(text)
    if len(sides) < 2:
        return None, text
    if is_name(sides[0]):
        return sides[0], "=".join(sides[1:])
    if is_name(sides[-1]) and not any(is_name(side) for side in sides[:-1]):
        return sides[-1], "=".join(sides[:-1])
    return None, text


def is_name(text: str) -> bool:
    """Return whether a text names a quantity, as what stands before the equals sign of an answer does."""
    return len(text) <= 60 and (_NAME.fullmatch(text) is not None or _POINT.fullmatch(text) is not None)


def split_equation(text: str) -> list[str]:
    """Split at the equals signs outside brackets."""
    return _sides(text)


def split_approximation(text: str) -> str:
    r"""Return the exact value of `\frac{1}{3} \approx 0.33`, or the text without the sign before a value alone."""
    exact, sign, rounded = text.partition(r"\approx")
    if not sign:
        return text
    return rounded.strip() if not exact.strip() or is_name(exact.strip()) else exact.strip()


def split_plus_minus(text: str) -> list[str]:
    r"""Return the two values of `1\pm\sqrt{5}`, or the text alone where there is no `\pm`."""
    signs = re.findall(r"\\pm|\\mp", text)
    if not signs or len(signs) > 4:
        return [text]
    upper = text.replace(r"\pm", "+").replace(r"\mp", "-")
    lower = text.replace(r"\pm", "-").replace(r"\mp", "+")
    return [side.replace("=+", "=").replace("(+", "(").removeprefix("+").strip() for side in (upper, lower)]


def split_relations(text: str) -> list[str]:
    r"""Split at <, >, \le, \ge, \ne and \in outside brackets: values at even places, signs at odd ones."""
    pieces, depth, start = [], 0, 0
    for match in _RELATION.finditer(text):
        depth = _depth(text[start : match.start()])
        if depth:
            continue
        pieces += [text[start : match.start()].strip(), match[1]]
        start = match.end()
    return [*pieces, text[start:].strip()]


def read_interval(text: str) -> Interval | None:
    r"""Return the interval of `(1, 2]`, `1 < x \le 2`, `x > 2`, `x \in [1, 2]` or `\{x | x > 2\}`, or None."""
    if text in (r"\mathbb{R}", r"\Re"):
        return Interval(r"-\infty", r"\infty", False, False)
    brackets = read_brackets(text)
    if brackets is not None and brackets.opening == "{":
        builder = re.fullmatch(r"\\\{(?:[A-Za-z](?:\\in\s?\\mathbb\{R\})?)[|:](.*)\\\}", text, re.DOTALL)
        return read_interval(builder[1].strip()) if builder else None
    if brackets is not None:
        if len(brackets.parts) != 2:
            return None
        low, high = brackets.parts
        return Interval(low, high.removeprefix("+"), brackets.opening == "[", brackets.closing == "]")
    pieces = split_relations(text)
    if len(pieces) == 3 and pieces[1] == r"\in" and is_name(pieces[0]):
        inside = read_interval(pieces[2])
        return None if inside is None else inside._replace(name=pieces[0])
    if len(pieces) == 3:
        return _half_line(*pieces)
    if len(pieces) == 5 and is_name(pieces[2]):
        low, first, name, second, high = pieces
        if {first, second} <= {"<", r"\le"}:
            return Interval(low, high, first == r"\le", second == r"\le", name)
        if {first, second} <= {">", r"\ge"}:
            return Interval(high, low, second == r"\ge", first == r"\ge", name)
    return None


def split_union(text: str) -> list[str]:
    r"""Split at `\cup` outside brackets."""
    return split_top(text.replace(r"\cup", "\x1f"), "\x1f") if r"\cup" in text else [text]


def read_matrix(text: str) -> list[list[str]] | None:
    r"""Return the rows of a `\begin{pmatrix}...` of any kind of bracket, or None for anything else."""
    text = re.sub(r"^[(\[|]?\s*|\s*[)\]|]?$", "", text) if _BEGIN.search(text[:24]) else text
    match = _BEGIN.match(text)
    if match is None or match[1] not in _MATRICES:
        return None
    end = re.search(rf"\\end\{{{match[1]}\*?\}}$", text)
    if end is None or text.count(r"\begin") != 1:
        return None
    body = text[match.end() : end.start()]
    body = re.sub(r"^\{[lcr| ]*\}", "", body.strip()) if match[1] == "array" else body
    rows = [row.strip() for row in re.split(r"\\\\(?:\[[^\]]*\])?", body.replace(r"\hline", ""))]
    return [[cell.strip() for cell in row.split("&")] for row in rows if row]


def _half_line(left: str, sign: str, right: str) -> Interval | None:
    if sign not in _FLIPPED:
        return None
    if is_name(right) and not is_name(left):
        left, sign, right = right, _FLIPPED[sign], left
    if not is_name(left) or (is_name(right) and not right.startswith("\\")):
        return None
    if sign in (">", r"\ge"):
        return Interval(right, r"\infty", sign == r"\ge", False, left)
    return Interval(r"-\infty", right, False, sign == r"\le", left)


def _sides(text: str) -> list[str]:
    return split_top(text, "=")


def _split_words(text: str) -> list[str]:
    pieces, start = [], 0
    for match in _AND.finditer(text):
        if _depth(text[: match.start()]) == 0:
            pieces.append(text[start : match.start()].strip())
            start = match.end()
    return [*pieces, text[start:].strip()]


def _top_level(text: str, characters: str) -> list[int]:
    """Return the places of characters outside all brackets; none where the brackets do not match."""
    places, depth, environments = [], 0, 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in (r"\begin", r"\end"):
            environments += 1 if token == r"\begin" else -1
        elif token in _OPENING or token == r"\{":
            depth += 1
        elif token in _CLOSING or token == r"\}":
            depth -= 1
            if depth < 0:
                return []
        elif token in characters and depth == 0 and environments == 0:
            places.append(match.start())
    return places if depth == 0 else []


def _depth(text: str) -> int:
    opened = sum(text.count(bracket) for bracket in _OPENING)
    return opened - sum(text.count(bracket) for bracket in _CLOSING)


def _is_balanced(text: str) -> bool:
    """Return whether the brackets of a text match, of whatever kind: `[0, 1)` counts as one pair."""
    depth = 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        depth += (token in _OPENING or token == r"\{") - (token in _CLOSING or token == r"\}")
        if depth < 0:
            return False
    return depth == 0
