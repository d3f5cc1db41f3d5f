r"""The format rule: reasoning, one `</think>`, then one `\boxed{}`, so that answers can be read from responses."""

from __future__ import annotations

from megatron_r1v2.rewards.answer import last_boxed

_OPEN = "<think>"
_CLOSE = "</think>"


def format_score(text: str) -> float:
    r"""Return 1 for a well-formed response, else 0.

    The prompt ends with `<think>\n`, so the response is `reasoning</think>... \boxed{answer}`; one `<think>` at its
    start is allowed for templates that leave it to the model. All of this must hold: reasoning that is not empty;
    exactly one `</think>`; nothing boxed before it; exactly one box after it, closed and not empty.

    Args:
        text: the response without its stop token.
    """
    # No partial credit: each half is easy to produce without the other, and a policy that is paid for halves stays with
    # them (a box without reasoning, reasoning without an end).
    body = text.lstrip().removeprefix(_OPEN)
    reasoning, closed, conclusion = body.partition(_CLOSE)
    if not closed or _OPEN in body or _CLOSE in conclusion:
        return 0.0
    if not reasoning.strip() or r"\boxed" in reasoning or conclusion.count(r"\boxed") != 1:
        return 0.0
    answer = last_boxed(conclusion)
    return 1.0 if answer is not None and answer.strip() else 0.0
