"""The distance of the numbers in a response's box from those of the reference.

Imports math-verify by way of `answers.expressions`; calls of verifier workers name this module to load it beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_r1v2.rewards.answer import last_boxed
from megatron_r1v2.rewards.answers.expressions import MAX_EXPRESSION_CHARACTERS, value_of
from megatron_r1v2.rewards.answers.normalisation import normalise
from megatron_r1v2.rewards.answers.quantities import read_quantity
from megatron_r1v2.rewards.answers.structure import (
    read_brackets,
    split_approximation,
    split_list,
    split_name,
    split_plus_minus,
)

# The authors of OlympiadBench let a number miss the tolerance by a hundredth of it, which rounding may cost.
_SLACK = 1.01


def answer_is_within(text: str, answer: str, tolerances: Sequence[float]) -> bool:
    r"""Return whether the numbers in the last box of a response are those of the reference, in any order, or near them.

    Args:
        answer: the reference, its parts separated by ", ".
        tolerances: absolute; one for all parts of the reference, or one for each.
    """
    boxed = last_boxed(text)
    if boxed is None or len(boxed) > MAX_EXPRESSION_CHARACTERS:
        return False
    given, references = _numbers(boxed), [_numbers(part) for part in answer.split(", ")]
    allowed = [*tolerances] * len(references) if len(tolerances) == 1 else tolerances
    if not len(given) == len(references) == len(allowed):
        return False
    for reference, tolerance in zip(references, allowed, strict=True):
        near = [number for number in given if len(reference) == 1 and abs(number - reference[0]) <= _SLACK * tolerance]
        if not near:
            return False
        given.remove(near[0])
    return True


def _numbers(text: str) -> list[float]:
    """Return the real numbers that a text lists (`x = 3.5` is 3.5); none where something else is among them."""
    text = normalise(text)
    brackets = read_brackets(text)
    if read_quantity(text) is not None:
        parts = [text]
    else:
        parts = [*brackets.parts] if brackets is not None and brackets.opening == "{" else split_list(text)
    values = [_value(value) for part in parts for value in split_plus_minus(part)]
    numbers = [value for value in values if value is not None]
    return numbers if len(numbers) == len(values) else []


def _value(text: str) -> float | None:
    text = split_approximation(split_name(text)[1])
    quantity = read_quantity(text, attached=True)
    if quantity is None:
        return value_of(text)
    try:
        return float(quantity.number.value)
    except OverflowError:
        return None
