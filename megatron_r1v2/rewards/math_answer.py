"""Are two LaTeX expressions equal?

The one module that imports math-verify (half a second); loaded when first needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
from math_verify import parse, verify

from megatron_r1v2.rewards.answer import MAX_EXPRESSION_CHARACTERS, last_boxed, plain_text, read_number

# The authors of OlympiadBench let a number miss the tolerance by a hundredth of it, which rounding may cost.
_SLACK = 1.01


def expressions_agree(given: str, reference: str) -> bool:
    r"""Return whether math-verify finds two expressions equal.

    Its own time limits are off: they use SIGALRM, which works in a main thread only and cannot stop a computation
    inside C. `VerifierPool` holds the limit from outside.

    Args:
        given: the content of the response's box, LaTeX or plain.
        reference: the reference answer, LaTeX or plain.
    """
    parsed_reference = parse(rf"\boxed{{{reference}}}", parsing_timeout=None)
    parsed_given = parse(rf"\boxed{{{given}}}", parsing_timeout=None)
    return bool(verify(parsed_reference, parsed_given, timeout_seconds=None))


def answer_is_within(text: str, answer: str, tolerances: Sequence[float]) -> bool:
    r"""Return whether the numbers in the last box of a response are those of the reference, in any order, or near them.

    Args:
        text: the response.
        answer: the reference, its parts parted by ", ".
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
    number = read_number(plain_text(text))
    parsed = [sympy.Rational(number)] if number is not None else parse(rf"\boxed{{{text}}}", parsing_timeout=None)
    values = list(parsed[0]) if parsed and isinstance(parsed[0], sympy.FiniteSet) else parsed[:1]
    values = [value.rhs if isinstance(value, sympy.Eq) else value for value in values]
    if not all(isinstance(value, sympy.Expr) and value.is_real and not value.free_symbols for value in values):
        return []
    try:
        return [float(value) for value in values]
    except OverflowError:
        return []
