"""Tokens of responses, as they come, into the answers of OpenAI's chat completions, whole or as the chunks of a stream.

The text that is sent has whole characters, nothing of a stop string, and reasoning apart from the answer.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_r1v2.generation.tokens import DrawnToken
from megatron_r1v2.serve.chat_request import ChatRequest

STREAM_END = "data: [DONE]\n\n"

Json = dict[str, object]
Decode = Callable[[Sequence[int]], str]

_HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""A decoder's text for bytes that are not a character yet."""
# Tokens that are decoded again with each new one, where no character has ended for long.
_WINDOW = 64
_KEPT = 8


class TextDecoder:
    """A decoder token by token: the parts put together are the text of all tokens."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        """The newest; with those before them they decode as they would without."""
        self._returned = 0
        """Characters of the text of `_tokens` that were returned."""

    def push(self, token_id: int) -> str:
        """Add a token and return the characters that no later token can change."""
        self._tokens.append(token_id)
        text = self._decode(self._tokens)
        # Bytes that begin a character decode to one replacement character, at the end.
        safe = text.removesuffix(_HALF_CHARACTER)
        new = safe[self._returned :]
        self._returned = max(self._returned, len(safe))
        # Some tokens stay as a context: some tokenizers drop a space at the start of a text.
        if safe == text:
            self._tokens = self._tokens[-1:]
            self._returned = len(self._decode(self._tokens))
        elif len(self._tokens) > _WINDOW:
            self._tokens = self._tokens[-_KEPT:]
            self._returned = len(self._decode(self._tokens).removesuffix(_HALF_CHARACTER))
        return new

    def finish(self) -> str:
        """Return the rest when no token follows."""
        return self._decode(self._tokens)[self._returned :] if self._tokens else ""


@dataclass(frozen=True)
class TextPiece:
    """The text and tokens of a response that can be sent after one more token."""

    text: str
    tokens: tuple[DrawnToken, ...]
    """The tokens whose text begins in this piece or in one before, each once; a stop token is never among them."""


class ChoiceText:
    """The text of one response, and when and why it ends.

    Args:
        stop: texts that end it; they are left out of it.
        hidden_ids: tokens without a text.
    """

    def __init__(
        self,
        decode: Decode,
        *,
        stop_ids: frozenset[int],
        stop: Sequence[str],
        hidden_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.finish_reason: str | None = None
        """"stop" or "length" once the response has ended; after a stop string the engine must be told to cancel."""
        self.num_tokens = 0
        """Generated so far, a stop token included."""
        self._decoder = TextDecoder(decode)
        self._stop_ids = stop_ids
        self._hidden_ids = hidden_ids
        self._stop = tuple(stop)
        self._held = ""
        """Not released yet, since it may be the beginning of a stop string."""
        self._released = 0
        """Characters released so far."""
        self._waiting: list[tuple[int, DrawnToken]] = []
        """Tokens not released yet, with the number of characters before each."""

    def push(self, token: DrawnToken) -> TextPiece:
        """Add the next token and return what can be sent now.

        Args:
            token: of this response; not after it has ended.
        """
        self.num_tokens += 1
        is_stop = token.token_id in self._stop_ids
        if not is_stop:
            self._waiting.append((self._released + len(self._held), token))
            if token.token_id not in self._hidden_ids:
                self._held += self._decoder.push(token.token_id)
        if token.is_last or is_stop:
            self._held += self._decoder.finish()
        if (cut := self._first_stop()) is not None:
            self._held = self._held[:cut]
            self.finish_reason = "stop"
            end = self._released + cut
            self._waiting = [(start, waiting) for start, waiting in self._waiting if start < end]
        elif token.is_last or is_stop:
            self.finish_reason = "stop" if is_stop else "length"
        return self._release()

    def _first_stop(self) -> int | None:
        places = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        return min(places, default=None)

    def _release(self) -> TextPiece:
        keep = 0 if self.finish_reason else length_of_beginning(self._held, self._stop)
        text = self._held[: len(self._held) - keep]
        self._held = self._held[len(text) :]
        self._released += len(text)
        tokens = [token for start, token in self._waiting if self.finish_reason or start < self._released]
        del self._waiting[: len(tokens)]
        return TextPiece(text, tuple(tokens))


class ReasoningSplit:
    """Reasoning and answer of one response apart: the text before `</think>`, say, and the text behind it.

    Without an end of the reasoning, all of it is reasoning.
    """

    def __init__(self, ends: str) -> None:
        """Start before the first token, where a template that opens `<think>` leaves the model.

        Args:
            ends: text between reasoning and answer, in neither of them; empty: all is the answer.
        """
        self._ends = ends
        self.has_ended = not ends
        """Whether the answer has begun."""
        self._held = ""
        """Not released yet, since it may be the beginning of `ends`."""

    def push(self, text: str, *, is_last: bool) -> tuple[str, str]:
        """Add text and return what can be sent of the reasoning and of the answer."""
        if self.has_ended:
            return "", text
        self._held += text
        reasoning, end, answer = self._held.partition(self._ends)
        if end:
            self.has_ended, self._held = True, ""
            return reasoning, answer
        keep = 0 if is_last else length_of_beginning(self._held, (self._ends,))
        released = self._held[: len(self._held) - keep]
        self._held = self._held[len(released) :]
        return released, ""


def length_of_beginning(text: str, sought: Sequence[str]) -> int:
    """Return the length of the longest end of a text that begins one of the sought texts, and is not all of it."""
    longest = max((len(one) for one in sought), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(one.startswith(text[-length:]) for one in sought):
            return length
    return 0


def event(content: Json) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


class ChatAnswer:
    """The responses to one request as they grow, and the JSON that clients read of them.

    Args:
        prompt_tokens: of the prompt, image tokens included.
        hidden_ids: tokens without a text, but for their log-probs.
        reasoning_ends: text between reasoning and answer, where they are sent apart; empty: they are not.
    """

    def __init__(
        self,
        request: ChatRequest,
        *,
        decode: Decode,
        prompt_tokens: int,
        stop_ids: frozenset[int],
        hidden_ids: frozenset[int] = frozenset(),
        reasoning_ends: str = "",
    ) -> None:
        self.choices = [
            ChoiceText(decode, stop_ids=stop_ids, stop=request.stop, hidden_ids=hidden_ids) for _ in range(request.n)
        ]
        self.includes_usage = request.stream_options.include_usage
        """Whether a stream ends with the token counts."""
        self._splits = [ReasoningSplit(reasoning_ends) for _ in range(request.n)]
        self._reasoning_ends = reasoning_ends
        self._with_log_probs = request.logprobs
        self._decode = decode
        self._prompt_tokens = prompt_tokens
        self._frame: Json = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}

    def whole(self, pieces: Sequence[Sequence[TextPiece]]) -> Json:
        """Return the answer of a request that is not streamed: the pieces of each response, which have ended."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", **self._whole_text(index, parts), "refusal": None},
                "logprobs": self._log_probs([token for piece in parts for token in piece.tokens]),
                "finish_reason": choice.finish_reason,
            }
            for index, (choice, parts) in enumerate(zip(self.choices, pieces, strict=True))
        ]
        return {**self._frame, "object": "chat.completion", "choices": choices, "usage": self._usage()}

    def opening(self, index: int) -> Json:
        """Return the first chunk of a response."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def piece(self, index: int, piece: TextPiece) -> Json:
        """Return a chunk with a piece of a response, the last with the reason of its end."""
        finish_reason = self.choices[index].finish_reason
        reasoning, content = self._splits[index].push(piece.text, is_last=finish_reason is not None)
        delta: Json = {"reasoning_content": reasoning, "content": content}
        delta = {name: text for name, text in delta.items() if text}
        return self._chunk(index, delta, self._log_probs(piece.tokens), finish_reason)

    def usage_chunk(self) -> Json:
        """Return the chunk with the token counts that ends a stream."""
        return {**self._frame, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        completion = sum(choice.num_tokens for choice in self.choices)
        total = self._prompt_tokens + completion
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": completion, "total_tokens": total}

    def _whole_text(self, index: int, parts: Sequence[TextPiece]) -> dict[str, str | None]:
        split = self._splits[index]
        reasoning, content = split.push("".join(piece.text for piece in parts), is_last=True)
        if not self._reasoning_ends:
            return {"content": content}
        # null: the reasoning has no end, so there is no answer, not even an empty one.
        return {"content": content if split.has_ended else None, "reasoning_content": reasoning}

    def _chunk(self, index: int, delta: Json, log_probs: Json | None, finish_reason: str | None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": finish_reason}
        return {**self._frame, "object": "chat.completion.chunk", "choices": [choice]}

    def _log_probs(self, tokens: Sequence[DrawnToken]) -> Json | None:
        if not self._with_log_probs:
            return None
        content = [
            self._log_prob(token.token_id, token.log_prob)
            | {"top_logprobs": [self._log_prob(*alternative) for alternative in token.alternatives]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _log_prob(self, token_id: int, log_prob: float) -> Json:
        text = self._decode([token_id])
        # A token may be a part of a character: then it has no text, and its bytes are the tokenizer's own business.
        is_text = "\N{REPLACEMENT CHARACTER}" not in text
        return {"token": text, "logprob": log_prob, "bytes": list(text.encode()) if is_text else None}
