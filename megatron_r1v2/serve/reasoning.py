"""Reasoning and answer of a response apart, as it comes: what stands before `</think>`, and what stands after it."""

from __future__ import annotations

from megatron_r1v2.serve.chat_text import length_of_beginning


class ReasoningSplit:
    """Parts the text of one response; without an end of the reasoning, all of it is the answer."""

    def __init__(self, ends: str) -> None:
        """Start before the first token, where a template that opens `<think>` leaves the model.

        Args:
            ends: text between reasoning and answer, in neither of them; empty: nothing is parted.
        """
        self._ends = ends
        self.has_ended = not ends
        """Whether what follows is the answer."""
        self._held = ""
        """Not told yet, since it may be the beginning of `ends`."""

    def push(self, text: str, *, is_last: bool) -> tuple[str, str]:
        """Add text and return what can be told of the reasoning and of the answer.

        Args:
            text: the next.
            is_last: nothing follows.
        """
        if self.has_ended:
            return "", text
        self._held += text
        reasoning, found, answer = self._held.partition(self._ends)
        if found:
            self.has_ended, self._held = True, ""
            return reasoning, answer
        keep = 0 if is_last else length_of_beginning(self._held, (self._ends,))
        told = self._held[: len(self._held) - keep]
        self._held = self._held[len(told) :]
        return told, ""
