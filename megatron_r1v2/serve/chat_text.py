"""Tokens of a response, as they come, into text that can be sent: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_r1v2.generation.controller import DrawnToken

Decode = Callable[[Sequence[int]], str]

_HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""What a decoder makes of bytes that are no character yet."""
# Tokens that are decoded again with each new one, where no character has ended for long.
_WINDOW = 64
_KEPT = 8


class TextDecoder:
    """Decodes token by token; the parts put together are the text of all tokens."""

    def __init__(self, decode: Decode) -> None:
        """Start with no token.

        Args:
            decode: of the tokenizer.
        """
        self._decode = decode
        self._tokens: list[int] = []
        """The newest; with those before them they decode as they would without."""
        self._told = 0
        """Characters of the text of `_tokens` that were returned."""

    def push(self, token_id: int) -> str:
        """Add a token and return the characters that no later token can change."""
        self._tokens.append(token_id)
        text = self._decode(self._tokens)
        # Bytes that begin a character decode to one replacement character, at the end.
        safe = text.removesuffix(_HALF_CHARACTER)
        new = safe[self._told :]
        self._told = max(self._told, len(safe))
        # Some tokens stay as a context: some tokenizers drop a space at the start of a text.
        if safe == text:
            self._tokens = self._tokens[-1:]
            self._told = len(self._decode(self._tokens))
        elif len(self._tokens) > _WINDOW:
            self._tokens = self._tokens[-_KEPT:]
            self._told = len(self._decode(self._tokens).removesuffix(_HALF_CHARACTER))
        return new

    def finish(self) -> str:
        """Return what is left when no token follows."""
        return self._decode(self._tokens)[self._told :] if self._tokens else ""


@dataclass(frozen=True)
class Piece:
    """What a token adds to what can be sent."""

    text: str
    tokens: tuple[DrawnToken, ...]
    """Whose text begins in this piece or in one before, each once; a stop token is in none."""


class ChoiceText:
    """The text of one response, and when and why it ends."""

    def __init__(self, decode: Decode, *, stop_ids: frozenset[int], stop: Sequence[str]) -> None:
        """Start an empty response.

        Args:
            decode: of the tokenizer.
            stop_ids: tokens that end a response.
            stop: texts that end it; they are left out of it.
        """
        self.finish_reason: str | None = None
        """"stop" or "length" once the response has ended; after a stop string the engine must be told to cancel."""
        self.num_tokens = 0
        """Generated so far, a stop token included."""
        self._decoder = TextDecoder(decode)
        self._stop_ids = stop_ids
        self._stop = tuple(stop)
        self._held = ""
        """Not told yet, since it may be the beginning of a stop string."""
        self._released = 0
        """Characters told so far."""
        self._waiting: list[tuple[int, DrawnToken]] = []
        """Tokens not told yet, with the number of characters before each."""

    def push(self, token: DrawnToken) -> Piece:
        """Add the next token.

        Args:
            token: of this response; not after it has ended.

        Returns:
            What can be told now.
        """
        self.num_tokens += 1
        is_stop = token.token_id in self._stop_ids
        if not is_stop:
            self._waiting.append((self._released + len(self._held), token))
            self._held += self._decoder.push(token.token_id)
        if token.is_last:
            self._held += self._decoder.finish()
        if (cut := self._first_stop()) is not None:
            self._held = self._held[:cut]
            self.finish_reason = "stop"
            end = self._released + cut
            self._waiting = [(start, waiting) for start, waiting in self._waiting if start < end]
        elif token.is_last:
            self.finish_reason = "stop" if is_stop else "length"
        return self._release()

    def _first_stop(self) -> int | None:
        found = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        return min(found, default=None)

    def _release(self) -> Piece:
        keep = 0 if self.finish_reason else length_of_beginning(self._held, self._stop)
        text = self._held[: len(self._held) - keep]
        self._held = self._held[len(text) :]
        self._released += len(text)
        told = [token for start, token in self._waiting if self.finish_reason or start < self._released]
        del self._waiting[: len(told)]
        return Piece(text, tuple(told))


def length_of_beginning(text: str, sought: Sequence[str]) -> int:
    """Return the length of the longest end of a text that begins one of the sought texts, and is not all of it.

    Args:
        text: so far.
        sought: what may follow.
    """
    longest = max((len(one) for one in sought), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(one.startswith(text[-length:]) for one in sought):
            return length
    return 0
