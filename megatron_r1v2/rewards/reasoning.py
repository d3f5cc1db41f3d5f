"""Rules for the reasoning of a response: steps that lead to its answer, no repetition, an end in time.

Standard library only, because the verifier workers import this.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_r1v2.rewards.answer import last_boxed, plain_text

if TYPE_CHECKING:  # the workers must start without torch, which types.py imports
    from megatron_r1v2.types import FinishReason

_CLOSE = "</think>"
# Between steps: a line break, a mark followed by a space ("1,000" and "3.5" are one word), or a CJK mark.
_STEP_END = re.compile("[\\n\u3002\uff0c\uff1b\uff01\uff1f]|[.,;!?](?=\\s|$)")


def steps_score(text: str, wanted: int, conclusion: int) -> float:
    r"""Return min(1, distinct steps / wanted), or 0 where the steps do not lead to the boxed answer.

    A step is a line, a sentence or a clause of the reasoning before `</think>` with a letter or digit in it; two that
    differ only in case or spaces count once. The reasoning leads to the answer when one of the last `conclusion` steps
    contains, as a word of its own, the content of the last `\boxed{}` after `</think>`.

    Args:
        wanted: distinct steps of a complete reasoning, at least 1.
        conclusion: so many last steps may hold the answer, at least 1.
    """
    reasoning, _, rest = text.partition(_CLOSE)
    answer = _normal(last_boxed(rest) or "")
    steps = [step for step in map(_normal, _STEP_END.split(reasoning)) if any(map(str.isalnum, step))]
    # Both halves at once, because either alone is easy: a guess behind empty reasoning, or steps that lead nowhere.
    if not answer or not any(_names(step, answer) for step in steps[-conclusion:]):
        return 0.0
    return min(1.0, len(set(steps)) / wanted)


def repetition_score(token_ids: Sequence[int], tokens: int) -> float:
    """Return distinct n-grams / n-grams: 1 without repetition, towards 0 for a loop.

    Args:
        token_ids: of the response; fewer than `tokens` repeat nothing.
        tokens: n, at least 1.
    """
    # Of tokens and not of words, which a loop without spaces, or in a script without them, does not have.
    count = len(token_ids) - tokens + 1
    if count < 1:
        return 1.0
    return len({tuple(token_ids[start : start + tokens]) for start in range(count)}) / count


def overlong_score(length: int, finish_reason: FinishReason, *, longest: int, buffer: int) -> float:
    """Return DAPO's soft overlong punishment (equation 13 of arXiv 2503.14476) plus 1, a part in [0, 1].

    1 up to longest - buffer tokens, from there linearly to 0 at the longest; 0 for a response that was cut.

    Args:
        length: tokens of the response, the stop token included.
        finish_reason: "length" for a response that was cut.
        longest: `generation.max_response_tokens`.
        buffer: tokens over which it falls, at most `longest`.
    """
    if finish_reason == "length" or length > longest:
        return 0.0
    if length <= longest - buffer:
        return 1.0
    return (longest - length) / buffer


def _normal(text: str) -> str:
    return plain_text(text).casefold()


def _names(step: str, answer: str) -> bool:
    """Return whether a step contains the answer as a word of its own: 8 is not in 18, 8.5 or 0.8."""
    start = step.find(answer)
    while start >= 0:
        end = start + len(answer)
        before, after = step[max(0, start - 2) : start], step[end : end + 2]
        joined_left = before[-1:].isalnum() or (before[-1:] == "." and before[:1].isdigit())
        joined_right = after[:1].isalnum() or (after[:1] == "." and after[1:].isdigit())
        if not joined_left and not joined_right:
            return True
        start = step.find(answer, start + 1)
    return False
