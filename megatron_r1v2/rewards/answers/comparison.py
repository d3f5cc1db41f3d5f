"""The comparison of an answer with a reference: one function a kind, each the rule of docs/rewards.md that it names.

Standard library only, but for expressions: math-verify is imported when the first one is compared.
Texts are from `normalise`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from megatron_r1v2.rewards.answers.choices import read_choice
from megatron_r1v2.rewards.answers.dates import read_date
from megatron_r1v2.rewards.answers.kinds import Kind, is_text, kind_of, read_numeral
from megatron_r1v2.rewards.answers.quantities import quantities_equal, read_quantity
from megatron_r1v2.rewards.answers.structure import (
    Interval,
    read_brackets,
    read_interval,
    read_matrix,
    split_approximation,
    split_equation,
    split_list,
    split_name,
    split_plus_minus,
    split_relations,
    split_top,
    split_union,
    without_domain,
)
from megatron_r1v2.rewards.answers.units import Unit, read_unit

# Beyond this nobody lists solutions, and each pair of parts may cost a question to math-verify.
_MAX_PARTS = 40
_MAX_SIDES = 6
_LOOSE_NUMBERS = re.compile(r"(?<![_^\d.])\d+(?:\.\d+)? \d")
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_FUNCTION_NAMES = re.compile(r"y|[fgh]\(x\)")


def answers_agree(given: str, reference: str) -> bool:
    """Return whether an answer is right by the rule of the reference's kind."""
    if given == reference:
        return True
    given, reference = without_domain(given), without_domain(reference)
    if not given or not reference:
        return False
    return _RULES[kind_of(reference)](given, reference)


def texts_equal(given: str, reference: str) -> bool:
    """Return whether two texts are the same words in the same order, in either case (rule 18)."""
    return _folded(given) == _folded(reference)


def _choices(given: str, reference: str) -> bool:
    return read_choice(given) == read_choice(reference)


def _dates(given: str, reference: str) -> bool:
    return read_date(given) == read_date(reference)


def _numerals(given: str, reference: str) -> bool:
    return read_numeral(split_name(given)[1]) == read_numeral(reference)


def _texts(given: str, reference: str) -> bool:
    if texts_equal(given, reference):
        return True
    # xy is also x times y where the answer says so: x \cdot y is no word.
    is_product = len(reference) <= 3 and reference.isalpha() and not re.fullmatch(r"[A-Za-z ]+", given)
    return is_product and not is_text(given) and kind_of(given) is Kind.EXPRESSION and _ask(given, reference)


def _quantities(given: str, reference: str) -> bool:
    expected = read_quantity(reference)
    assert expected is not None, "the reference is of this kind"
    if "," in reference and len(parts := split_list(given)) > 1:
        # 45,135 may be two values (rule 4): an answer that lists just these is right.
        return _same_parts(_solutions(", ".join(parts)), split_list(reference))
    values = _values(given) if read_date(given) is None else []
    for value in values:
        quantity = read_quantity(value, attached=True)
        if quantity is not None:
            if not quantities_equal(quantity, expected):
                return False
        elif not _is_expression(value) or not _expression_is(value, reference):
            return False
    return bool(values)


def _expression_is(given: str, reference: str) -> bool:
    """Compare what has to be computed: the units by rule 6, the rest by math-verify."""
    body, unit = _without_unit(given)
    expected, right_unit = _without_unit(reference)
    has_units = unit is not None and right_unit is not None and unit.dimensions and right_unit.dimensions
    # 2\sqrt{3} cm and 0.02\sqrt{3} m: nobody converts the units of what is left unevaluated.
    return not (has_units and unit != right_unit) and _ask(body, expected)


def _expressions(given: str, reference: str) -> bool:
    values = _values(given)
    expected = split_approximation(reference)
    return bool(values) and all(
        value == expected or (_is_computable(value) and _expression_is(value, expected)) for value in values
    )


def _assignments(given: str, reference: str) -> bool:
    name, _ = split_name(given)
    expected_name, _ = split_name(reference)
    if name is not None and expected_name is not None and not _same_name(name, expected_name):
        return False
    if name is None and len(split_equation(given)) > 1:
        return _equations(given, reference)
    return any(
        answers_agree(given if name is None else _value(given), value)
        for value in dict.fromkeys(_values(reference)[::-1])
    )


def _equations(given: str, reference: str) -> bool:
    left, right = split_relations(given), split_relations(reference)
    if len(left) > 1 or len(right) > 1:
        return _relations(left, right)
    sides, expected = split_equation(given), split_equation(reference)
    if len(sides) != len(expected) or len(sides) < 2:
        return False
    if len(sides) == 2:
        from megatron_r1v2.rewards.answers.expressions import equations_agree

        return _are_computable([*sides, *expected]) and equations_agree(
            (sides[0], sides[1]), (expected[0], expected[1])
        )
    return all(answers_agree(*pair) for pair in zip(sides, expected, strict=True))


def _relations(given: Sequence[str], reference: Sequence[str]) -> bool:
    """Compare inequalities: the same signs between the same values, read from either side, or the same difference."""
    if len(given) != len(reference) or len(given) < 3:
        return False
    turned = [_FLIPPED.get(piece, piece) for piece in reversed(given)]
    for read in (list(given), turned):
        if read[1::2] == list(reference[1::2]) and all(map(answers_agree, read[::2], reference[::2])):
            return True
    if len(given) != 3 or not {given[1], reference[1]} <= _FLIPPED.keys():
        return False
    from megatron_r1v2.rewards.answers.expressions import inequalities_agree

    sides = given if given[1] == reference[1] else turned
    return (
        sides[1] == reference[1]
        and _are_computable([*sides[::2], *reference[::2]])
        and inequalities_agree((sides[0], sides[2]), (reference[0], reference[2]))
    )


def _tuples(given: str, reference: str) -> bool:
    expected = read_brackets(reference)
    assert expected is not None, "the reference is of this kind"
    given = _value(given)
    brackets = read_brackets(given)
    if brackets is None:
        interval = read_interval(given)
        if interval is not None:
            return _intervals_equal(interval, read_interval(reference))
        parts: Sequence[str] = split_list(given)
        return _in_order(parts, expected.parts)
    same = (brackets.opening, brackets.closing) == (expected.opening, expected.closing)
    return same and _in_order(brackets.parts, expected.parts)


def _lists(given: str, reference: str) -> bool:
    named = [split_name(part) for part in split_list(reference)]
    point = read_brackets(given)
    if point is not None and point.opening == "(" and len({name for name, _ in named} - {None}) == len(named):
        # (1, 2) gives x = 1, y = 2 in their order.
        return _in_order(point.parts, [value for _, value in named])
    return _same_parts(_solutions(given), _solutions(reference))


def _sequences(given: str, reference: str) -> bool:
    return _in_order(split_list(_value(given)), split_list(_value(reference)))


def _sets(given: str, reference: str) -> bool:
    given = _value(given)
    brackets, expected = read_brackets(given), read_brackets(reference)
    assert expected is not None, "the reference is of this kind"
    if brackets is not None and brackets.opening != "{":
        return False
    parts = brackets.parts if brackets is not None else split_list(given)
    left, right = _distinct(_expanded(parts)), _distinct(_expanded(expected.parts))
    # Each way for itself: 0.5 and 1/2 are one element.
    return (
        max(len(left), len(right)) <= _MAX_PARTS
        and all(any(answers_agree(part, other) for other in right) for part in left)
        and all(any(answers_agree(part, other) for part in left) for other in right)
    )


def _intervals(given: str, reference: str) -> bool:
    name, expected_name = _relation_name(given), _relation_name(reference)
    if name is not None and expected_name is not None and not _same_name(name, expected_name):
        return False
    parts, expected = _interval_parts(given), _interval_parts(reference)
    if len(parts) != len(expected):
        return False
    if len(parts) == 1 and read_interval(parts[0]) is None:
        # -x > -1 is not an interval as it stands.
        return _relations(split_relations(given), split_relations(reference))
    return _matched(parts, expected, _interval_part_equal)


def _matrices(given: str, reference: str) -> bool:
    rows, expected = read_matrix(_value(given)), read_matrix(reference)
    assert expected is not None, "the reference is of this kind"
    if rows is None:
        # A sum or product of matrices.
        return r"\begin" in given and _is_computable(_value(given)) and _ask(_value(given), reference)
    if [len(row) for row in rows] != [len(row) for row in expected]:
        return False
    return all(
        answers_agree(*pair) for row, other in zip(rows, expected, strict=True) for pair in zip(row, other, strict=True)
    )


def _ratios(given: str, reference: str) -> bool:
    parts, expected = split_top(_value(given), ":"), split_top(reference, ":")
    if _in_order(parts, expected):
        return True
    # 3:45 and 1:15 are two times of day as well as one ratio.
    clocks = [re.fullmatch(r"\d{1,2}:[0-5]\d", text) is not None for text in (_value(given), reference)]
    if all(clocks) or not _are_computable([*parts, *expected]):
        return False
    if len(parts) == 1 and len(expected) == 2:
        return _ask(parts[0], f"({expected[0]})/({expected[1]})")
    return len(parts) == len(expected) and all(
        _ask(rf"({part})\cdot({expected[0]})", rf"({other})\cdot({parts[0]})")
        for part, other in zip(parts, expected, strict=True)
    )


_RULES: Mapping[Kind, Callable[[str, str], bool]] = {
    Kind.NUMBER: _quantities,
    Kind.EXPRESSION: _expressions,
    Kind.ASSIGNMENT: _assignments,
    Kind.EQUATION: _equations,
    Kind.TUPLE: _tuples,
    Kind.LIST: _lists,
    Kind.SEQUENCE: _sequences,
    Kind.SET: _sets,
    Kind.INTERVAL: _intervals,
    Kind.MATRIX: _matrices,
    Kind.RATIO: _ratios,
    Kind.NUMERAL: _numerals,
    Kind.CHOICE: _choices,
    Kind.DATE: _dates,
    Kind.TEXT: _texts,
}


def _ask(given: str, reference: str) -> bool:
    # Imported here because it takes half a second and most answers never need it.
    from megatron_r1v2.rewards.answers.expressions import expressions_agree

    return expressions_agree(given, reference)


def _values(text: str) -> list[str]:
    r"""Return the values that a text gives one quantity: of `x = 2+3 = 5` two, which must both be right."""
    name, value = split_name(text)
    sides = split_equation(value)
    if len(sides) > _MAX_SIDES or (name is None and len(sides) > 1 and not all(map(_is_computable, sides))):
        return []
    return [split_approximation(side) for side in sides]


def _value(text: str) -> str:
    return split_name(text)[1]


def _is_expression(text: str) -> bool:
    return _is_computable(text) and kind_of(text) in (Kind.EXPRESSION, Kind.RATIO)


def _is_computable(text: str) -> bool:
    """Return whether math-verify may be asked: it would read words as products, and a range as a difference."""
    return bool(text) and not is_text(text) and read_date(text) is None and not _LOOSE_NUMBERS.search(text)


def _are_computable(texts: Sequence[str]) -> bool:
    return all(map(_is_computable, texts))


def _without_unit(text: str) -> tuple[str, Unit | None]:
    r"""Split `2\sqrt{3} cm` into the expression and its unit; `\frac{v^2}{2} g` has a variable and no unit."""
    match = re.fullmatch(
        r"(.*[\d})!]|.*\\(?:pi|infty))(?:\s+([A-Za-z].*)|\s*(\^\\circ|%|\\\$)|(cm|km|mm|dm|kg|ft|yd)(\^[23])?)",
        text,
        re.DOTALL,
    )
    if match is None:
        return text, None
    body, tail = match[1], text[len(match[1]) :].strip()
    # Neither the g of v^2 g nor the degrees of \sin 30^\circ are a unit of the whole.
    others = re.search(r"[A-Za-z]", re.sub(r"\\(?:frac|sqrt|pi|times|cdot|infty)(?![A-Za-z])", "", body))
    unit = None if others else read_unit(tail)
    if unit is None or any(ord(char) > 127 for char in tail):
        return text, None
    return body.strip(), unit


def _same_name(given: str, reference: str) -> bool:
    left, right = (re.sub(r"[\s{}]|^m(?=\\angle)", "", name) for name in (given, reference))
    return left == right or all(_FUNCTION_NAMES.fullmatch(name) for name in (left, right))


def _relation_name(text: str) -> str | None:
    interval = read_interval(text)
    return interval.name if interval is not None else split_name(text)[0]


def _folded(text: str) -> str:
    text = re.sub(r"\\(?=(?:angle|triangle|square|parallelogram) )", "", text)
    text = re.sub(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])", "", text.casefold())
    # Lowered digits of a formula are the same digits: H_2O, C_6H_{12}O_6.
    text = re.sub(r"_(?:(\d)|\{(\d+)\})", r"\1\2", re.sub(r"\^\{([^{}]*)\}", r"^\1", text))
    return text.removeprefix("the ").rstrip(".")


def _in_order(given: Sequence[str], reference: Sequence[str]) -> bool:
    return len(given) == len(reference) and all(map(answers_agree, given, reference))


def _solutions(text: str) -> list[str]:
    brackets = read_brackets(_value(text))
    if brackets is not None and (brackets.opening == "{" or (len(brackets.parts) > 1 and _is_open(brackets.opening))):
        return _expanded(brackets.parts)
    parts = split_list(text)
    name = split_name(parts[0])[0] if parts else None
    if name is not None and all(split_name(part)[0] in (None, name) for part in parts):
        # x = 1, 2 names both.
        parts = [_value(part) for part in parts]
    return _expanded(parts)


def _is_open(opening: str) -> bool:
    return opening == "["


def _expanded(parts: Sequence[str]) -> list[str]:
    return [value for part in parts for value in split_plus_minus(part)]


def _distinct(parts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(parts))


def _same_parts(given: Sequence[str], reference: Sequence[str]) -> bool:
    return len(given) == len(reference) <= _MAX_PARTS and _matched(given, reference, answers_agree)


def _matched(given: Sequence[str], reference: Sequence[str], equal: Callable[[str, str], bool]) -> bool:
    """Return whether each part has its own counterpart, in any order."""
    rest = list(given)
    for part in reference:
        found = part if part in rest else next((other for other in rest if equal(other, part)), None)
        if found is None:
            return False
        rest.remove(found)
    return True


def _interval_parts(text: str) -> list[str]:
    if read_interval(text) is None:
        text = _value(text)
    if (pieces := split_relations(text))[1:2] == [r"\in"] and len(pieces) == 3:
        text = pieces[2]
    return [part for piece in split_union(text) for part in _split_conditions(piece)]


def _split_conditions(text: str) -> list[str]:
    parts = split_list(text)
    return parts if len(parts) > 1 and all(read_interval(part) is not None for part in parts) else [text]


def _interval_part_equal(given: str, reference: str) -> bool:
    expected = read_interval(reference)
    if expected is None:
        return answers_agree(given, reference)
    return _intervals_equal(read_interval(given), expected)


def _intervals_equal(given: Interval | None, reference: Interval | None) -> bool:
    if given is None or reference is None:
        return False
    if (given.has_low, given.has_high) != (reference.has_low, reference.has_high):
        return False
    return answers_agree(given.low, reference.low) and answers_agree(given.high, reference.high)
