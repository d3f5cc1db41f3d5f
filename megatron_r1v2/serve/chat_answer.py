"""Answers in the shape of OpenAI's chat completions: whole, and as the chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from megatron_r1v2.generation.controller import DrawnToken
from megatron_r1v2.serve.chat_text import ChoiceText, Decode, Piece
from megatron_r1v2.serve.reasoning import ReasoningSplit

STREAM_END = "data: [DONE]\n\n"


def event(content: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


class ChatAnswer:
    """What all parts of an answer to one request have in common."""

    def __init__(
        self,
        *,
        model: str,
        decode: Decode,
        prompt_tokens: int,
        num_choices: int,
        num_alternatives: int | None,
        reasoning_ends: str = "",
    ) -> None:
        """Begin an answer.

        Args:
            model: its name.
            decode: of the tokenizer.
            prompt_tokens: of the prompt, image tokens included.
            num_choices: responses.
            num_alternatives: told for each token; None: no log-probs.
            reasoning_ends: text between reasoning and answer, where they are told apart; empty: they are not.
        """
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._model = model
        self._decode = decode
        self._created = int(time.time())
        self._prompt_tokens = prompt_tokens
        self._num_alternatives = num_alternatives
        self._reasoning_ends = reasoning_ends
        self._splits = [ReasoningSplit(reasoning_ends) for _ in range(num_choices)]

    def whole(self, choices: Sequence[ChoiceText], pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """Return the answer of a request that is not streamed.

        Args:
            choices: the responses, ended.
            pieces: what each consisted of.
        """
        told = [
            {
                "index": index,
                "message": {"role": "assistant", **self._whole_text(index, parts), "refusal": None},
                "logprobs": self._log_probs([token for piece in parts for token in piece.tokens]),
                "finish_reason": choice.finish_reason,
            }
            for index, (choice, parts) in enumerate(zip(choices, pieces, strict=True))
        ]
        return self._frame("chat.completion", told) | {"usage": self.usage(choices)}

    def opening(self, index: int) -> dict[str, Any]:
        """Return the first chunk of a response."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def piece(self, index: int, piece: Piece, finish_reason: str | None) -> dict[str, Any]:
        """Return a chunk with a piece of a response, the last with the reason of its end."""
        reasoning, content = self._splits[index].push(piece.text, is_last=finish_reason is not None)
        delta = {"reasoning_content": reasoning, "content": content}
        told = {name: text for name, text in delta.items() if text}
        return self._chunk(index, told, self._log_probs(piece.tokens), finish_reason)

    def usage_chunk(self, choices: Sequence[ChoiceText]) -> dict[str, Any]:
        """Return the chunk with the token counts that ends a stream."""
        return self._frame("chat.completion.chunk", []) | {"usage": self.usage(choices)}

    def usage(self, choices: Sequence[ChoiceText]) -> dict[str, int]:
        """Return the token counts."""
        completion = sum(choice.num_tokens for choice in choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._prompt_tokens + completion,
        }

    def _whole_text(self, index: int, parts: Sequence[Piece]) -> dict[str, str | None]:
        split = self._splits[index]
        reasoning, content = split.push("".join(piece.text for piece in parts), is_last=True)
        if not self._reasoning_ends:
            return {"content": content}
        # null: the reasoning has no end, so there is no answer, not even an empty one.
        return {"content": content if split.has_ended else None, "reasoning_content": reasoning}

    def _chunk(
        self, index: int, delta: dict[str, Any], log_probs: dict[str, Any] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": finish_reason}
        return self._frame("chat.completion.chunk", [choice])

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def _log_probs(self, tokens: Sequence[DrawnToken]) -> dict[str, Any] | None:
        if self._num_alternatives is None:
            return None
        told = [
            self._log_prob(token.token_id, token.log_prob)
            | {"top_logprobs": [self._log_prob(*alternative) for alternative in token.alternatives]}
            for token in tokens
        ]
        return {"content": told, "refusal": None}

    def _log_prob(self, token_id: int, log_prob: float) -> dict[str, Any]:
        text = self._decode([token_id])
        # A token may be a part of a character: then it has no text, and its bytes are the tokenizer's own business.
        known = "\N{REPLACEMENT CHARACTER}" not in text
        return {"token": text, "logprob": log_prob, "bytes": list(text.encode()) if known else None}
