r"""Is the answer in the last `\boxed{}` of a response right?

Standard library only: the verifier workers import this.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the workers must start without torch, which types.py imports
    from megatron_r1v2.types import AnswerType

ANSWER_TYPES = ("numeric", "choice", "exact", "math")
# The default of `reward.numeric_tolerance`, for callers without settings.
NUMERIC_TOLERANCE = 1e-6
# A longer string is no number a person would give, and exact arithmetic on it would cost quadratic time.
MAX_NUMBER_CHARACTERS = 64
# Nor is this an expression; math-verify would run into the time limit, and a worker that did takes a second to replace.
MAX_EXPRESSION_CHARACTERS = 2000

_BOX = r"\boxed{"
# A backslash takes the next character with it: "\{" and "\}" are printed braces and do not open or close anything.
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_DECIMAL = r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:[eE][+-]?\d{1,3})?"
_NUMBER = re.compile(rf"(?=[+-]?\.?\d){_DECIMAL}", re.ASCII)
_SLASH_FRACTION = re.compile(r"([+-]?\d+)\s*/\s*([+-]?\d+)", re.ASCII)
_LATEX_FRACTION = re.compile(r"([+-]?)\s*\\[dt]?frac\{\s*([+-]?\d+)\s*\}\{\s*([+-]?\d+)\s*\}", re.ASCII)
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\{([^{}]*)\}")
_CHOICE = re.compile(r"[(\[]?\s*([A-Za-z])\s*(?:$|[)\].:])", re.ASCII)


def last_boxed(text: str) -> str | None:
    r"""Return what stands in the last `\boxed{...}` of a text.

    Args:
        text: a response; braces inside the box are matched, `\{` and `\}` are not counted.

    Returns:
        The content as it stands ("" for an empty box), or None when there is no box or the last one is never closed
        (an answer that was cut off is no answer, even when an earlier box is complete).
    """
    start = text.rfind(_BOX)
    if start < 0:
        return None
    start += len(_BOX)
    depth = 1
    for brace in _BRACE.finditer(text, start):
        if brace.group() == "{":
            depth += 1
        elif brace.group() == "}":
            depth -= 1
            if depth == 0:
                return text[start : brace.start()]
    return None


def answer_is_correct(
    text: str, answer: str, answer_type: AnswerType, numeric_tolerance: float = NUMERIC_TOLERANCE
) -> bool:
    r"""Return whether the last boxed answer of a response is right.

    An answer that equals the reference as text (outer spaces, `$` and `\text{}` aside) is right for every type; an
    empty box is always wrong. Hostile text can make "math" run for ever: call this through a `VerifierPool`.

    Args:
        text: the response.
        answer: the reference answer, without a box.
        answer_type: "numeric": equal as numbers, whole numbers exactly, others to the tolerance; "choice": the same
            option letter, in either case; "exact": equal as text; "math": equal as numbers, or mathematically
            equal by math-verify, which is not asked about more than 2,000 characters.
        numeric_tolerance: `reward.numeric_tolerance`, relative to the reference.

    Raises:
        ValueError: an unknown answer type.
    """
    if answer_type not in ANSWER_TYPES:
        raise ValueError(f"answer_type {answer_type!r} is unknown; use one of {', '.join(ANSWER_TYPES)}")
    boxed = last_boxed(text)
    if boxed is None or not boxed.strip():
        return False
    given, reference = plain_text(boxed), plain_text(answer)
    if not given or not reference:
        return False
    if given == reference:
        return True
    if answer_type == "numeric":
        return _numbers_agree(given, reference, numeric_tolerance)
    if answer_type == "choice":
        return _choices_agree(given, reference)
    # math-verify takes "8." for no number and "1e-3" for e - 3.
    if answer_type == "math" and _numbers_agree(given, reference, 0.0):
        return True
    if answer_type == "math" and len(boxed) <= MAX_EXPRESSION_CHARACTERS:
        # Imported here because it takes half a second and most runs never need it.
        from megatron_r1v2.rewards.math_answer import expressions_agree

        return expressions_agree(boxed, answer)
    return False


def plain_text(text: str) -> str:
    r"""Return the text without outer spaces, `$` and `\text{}`, with runs of spaces made one.

    Args:
        text: what stands in a box or in a line of reasoning.
    """
    unwrapped = _TEXT_COMMAND.sub(r"\1", text).replace(r"\$", "$")
    return " ".join(unwrapped.strip().strip("$").split())


def _numbers_agree(given: str, reference: str, tolerance: float) -> bool:
    left, right = read_number(given), read_number(reference)
    if left is None or right is None:
        return False
    if left.denominator == 1 and right.denominator == 1:
        return left == right
    # By way of its text, since the float 1e-6 is not exactly a millionth.
    return abs(left - right) <= Fraction(str(tolerance)) * abs(right)


def read_number(text: str) -> Fraction | None:
    r"""Return a number written as 8, -1,234.5, 1e-3, 3/4 or \frac{3}{4}, or None for anything else.

    Args:
        text: from `plain_text`.
    """
    if len(text) > MAX_NUMBER_CHARACTERS:
        return None
    text = text.replace("\N{MINUS SIGN}", "-").removesuffix(".").strip()
    if _NUMBER.fullmatch(text):
        return Fraction(text.replace(",", ""))
    if match := _SLASH_FRACTION.fullmatch(text):
        sign, numerator, denominator = "", *match.groups()
    elif match := _LATEX_FRACTION.fullmatch(text):
        sign, numerator, denominator = match.groups()
    else:
        return None
    if int(denominator) == 0:
        return None
    value = Fraction(int(numerator), int(denominator))
    return -value if sign == "-" else value


def _choices_agree(given: str, reference: str) -> bool:
    left, right = _CHOICE.match(given), _CHOICE.match(reference)
    return left is not None and right is not None and left.group(1).upper() == right.group(1).upper()
