r"""The verdict on the answer in the last `\boxed{}` of a response.

Standard library only: the verifier workers import this.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from megatron_r1v2.rewards.answers.choices import read_choice
from megatron_r1v2.rewards.answers.comparison import answers_agree, texts_equal
from megatron_r1v2.rewards.answers.normalisation import MAX_CHARACTERS, normalise, plain_text
from megatron_r1v2.rewards.answers.quantities import quantities_equal, read_quantity
from megatron_r1v2.rewards.answers.structure import split_approximation, split_name

if TYPE_CHECKING:  # the workers must start without torch, which types.py imports
    from megatron_r1v2.types import AnswerType

__all__ = [
    "ANSWER_TYPES",
    "NUMERIC_TOLERANCE",
    "answer_is_correct",
    "describe_misfit",
    "last_boxed",
    "plain_text",
    "type_of_alternative",
]

ANSWER_TYPES = ("numeric", "choice", "exact", "math")
NUMERIC_TOLERANCE = 1e-6
"""Numeric answers may differ by this part of the right one: the rounding of a correct calculation."""

_BOX = re.compile(r"\\boxed\s*\{")
# A backslash takes the next character with it: "\{" and "\}" are printed braces and do not open or close anything.
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""Return what stands in the last `\boxed{...}` of a text.

    Args:
        text: a response; braces inside the box are matched, `\{` and `\}` are not counted.

    Returns:
        The content as it stands ("" for an empty box), or None when there is no box or the last one is never closed
        (an answer that was cut off is no answer, even when an earlier box is complete).
    """
    start = _last_box(text)
    if start is None:
        return None
    depth = 1
    for brace in _BRACE.finditer(text, start):
        if brace.group() == "{":
            depth += 1
        elif brace.group() == "}":
            depth -= 1
            if depth == 0:
                return text[start : brace.start()]
    return None


def _last_box(text: str) -> int | None:
    r"""Return where the content of the last `\boxed{` or `\boxed {` begins."""
    end = len(text)
    while (place := text.rfind(r"\boxed", 0, end)) >= 0:
        if match := _BOX.match(text, place):
            return match.end()
        end = place
    return None


def answer_is_correct(
    text: str, answer: str, answer_type: AnswerType, numeric_tolerance: float = NUMERIC_TOLERANCE
) -> bool:
    r"""Return whether the last boxed answer of a response is right by the rules of docs/rewards.md.

    An empty box is always wrong. Hostile text can make "math" run for ever: call this through a `VerifierPool`.

    Args:
        answer: the reference answer, without a box.
        answer_type: "numeric": equal as numbers, whole numbers exactly, others to the tolerance; "choice": the same
            option letters, or the same text where the reference is none; "exact": equal as text; "math": right by the
            rule of the reference's kind.
        numeric_tolerance: accepted difference, relative to the reference.

    Raises:
        ValueError: an unknown answer type.
    """
    if answer_type not in ANSWER_TYPES:
        raise ValueError(f"answer_type {answer_type!r} is unknown; use one of {', '.join(ANSWER_TYPES)}")
    boxed = last_boxed(text)
    if boxed is None or not boxed.strip():
        return False
    given, reference = normalise(boxed), normalise(answer)
    if not given or not reference:
        return False
    if given == reference:
        return True
    if answer_type == "exact" or len(given) > MAX_CHARACTERS:
        return False
    if answer_type == "numeric":
        return _numbers_agree(given, reference, numeric_tolerance)
    if answer_type == "choice":
        return _choices_agree(given, reference)
    return answers_agree(given, reference)


def type_of_alternative(alternative: str, answer_type: AnswerType) -> AnswerType:
    """Return how a further right answer is compared: the text of an option is no letter, whatever it begins with."""
    is_letter = len(alternative.strip()) == 1
    return "math" if answer_type == "choice" and not is_letter else answer_type


def describe_misfit(answer: str, answer_type: AnswerType) -> str | None:
    """Return why no response could ever equal a reference, such as "is no number"; None: one can."""
    reference = normalise(answer)
    if not reference:
        return "has nothing in it to compare"
    if answer_type == "numeric" and read_quantity(split_approximation(split_name(reference)[1])) is None:
        return "is no number; use answer type math or exact"
    # Options may be numbered, but not up to 12: that is an answer in the wrong column.
    if answer_type == "choice" and not all(
        label.isalpha() or len(label) == 1 for label in read_choice(reference) or ("??",)
    ):
        return "is no option letter; use answer type math or exact"
    return None


def _numbers_agree(given: str, reference: str, tolerance: float) -> bool:
    left = read_quantity(split_approximation(split_name(given)[1]), attached=True)
    right = read_quantity(split_approximation(split_name(reference)[1]))
    return left is not None and right is not None and quantities_equal(left, right, tolerance)


def _choices_agree(given: str, reference: str) -> bool:
    letters = read_choice(reference)
    return texts_equal(given, reference) if letters is None else read_choice(given) == letters
