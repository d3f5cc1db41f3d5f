"""Tokens of an engine step and of the responses under way, in arrays: a step at scale draws tens of thousands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Alternatives = tuple[tuple[int, float], ...]
"""The most probable tokens with their log-probs, best first."""


@dataclass(frozen=True)
class DrawnToken:
    """The token that one step of the engine drew for one request."""

    request_id: int
    token_id: int
    log_prob: float
    """Its log-prob under the sampling distribution; see `sampling.draw`."""
    alternatives: Alternatives = ()
    is_last: bool = False
    """True for the last token of a response."""


@dataclass(frozen=True)
class StepTokens:
    """The tokens of one step, one for each request."""

    request_ids: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    log_probs: NDArray[np.float64]
    is_last: NDArray[np.bool_]
    alternatives: Mapping[int, Alternatives] = field(default_factory=dict)
    """By request id, of those that ask for them."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.request_ids)

    def __iter__(self) -> Iterator[DrawnToken]:
        """Yield the tokens one by one, for a server that sends each on."""
        arrays = (self.request_ids, self.token_ids, self.log_probs, self.is_last)
        for request_id, token_id, log_prob, is_last in zip(*(array.tolist() for array in arrays), strict=True):
            yield DrawnToken(request_id, token_id, log_prob, self.alternatives.get(request_id, ()), is_last)

    def select(self, is_wanted: NDArray[np.bool_]) -> StepTokens:
        """Return some of the tokens."""
        return StepTokens(
            self.request_ids[is_wanted],
            self.token_ids[is_wanted],
            self.log_probs[is_wanted],
            self.is_last[is_wanted],
            self.alternatives,
        )


class ResponseTokens:
    """The tokens of responses that have not ended, a row of two arrays for each.

    Args:
        max_tokens: of a response.
    """

    def __init__(self, max_tokens: int) -> None:
        self._token_ids = np.empty((0, max_tokens), dtype=np.int64)
        self._log_probs = np.empty((0, max_tokens), dtype=np.float64)
        self._lengths = np.empty(0, dtype=np.int64)
        self._rows: dict[int, int] = {}
        self._free: list[int] = []

    def append(self, step: StepTokens) -> None:
        """Add a token to each response of a step."""
        rows = np.array([self._row(request_id) for request_id in step.request_ids.tolist()], dtype=np.int64)
        places = self._lengths[rows]
        self._token_ids[rows, places] = step.token_ids
        self._log_probs[rows, places] = step.log_probs
        self._lengths[rows] += 1

    def pop(self, request_id: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Return the token ids and log-probs of a response, and give its row to another."""
        row = self._rows.pop(request_id)
        self._free.append(row)
        length = self._lengths[row]
        return tuple(self._token_ids[row, :length].tolist()), tuple(self._log_probs[row, :length].tolist())

    def _row(self, request_id: int) -> int:
        row = self._rows.get(request_id)
        if row is None:
            if not self._free:
                self._grow()
            row = self._rows[request_id] = self._free.pop()
            self._lengths[row] = 0
        return row

    def _grow(self) -> None:
        """Double the rows."""
        # The system gives memory to the pages that are written to, so rows cost what their responses are long.
        count = len(self._lengths)
        more = max(count, 16)
        self._token_ids = np.concatenate([self._token_ids, np.empty((more, self._token_ids.shape[1]), dtype=np.int64)])
        self._log_probs = np.concatenate([self._log_probs, np.empty((more, self._log_probs.shape[1]))])
        self._lengths = np.concatenate([self._lengths, np.zeros(more, dtype=np.int64)])
        self._free.extend(range(count, count + more))
