"""Requests between the web server and the engine: a bounded queue in, the tokens of each response out, all counted."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

from megatron_r1v2.generation.engine import Request
from megatron_r1v2.generation.sampling import Draw
from megatron_r1v2.generation.tokens import DrawnToken
from megatron_r1v2.serve.engine_loop import CommandQueue
from megatron_r1v2.serve.web import RequestError
from megatron_r1v2.types import Prompt

ChoiceToken = tuple[int, DrawnToken]
"""The number of a response to a request, and its next token."""


class PendingResponses:
    """The responses to one request, which the engine generates side by side."""

    def __init__(self, service: Service, request_ids: Sequence[int]) -> None:
        self.arrived: asyncio.Queue[ChoiceToken | RequestError] = asyncio.Queue()
        self.open = dict(enumerate(request_ids))
        """Responses that have not ended, by number."""
        self._service = service

    async def tokens(self) -> AsyncIterator[ChoiceToken]:
        """Yield tokens as they come, until all responses have ended.

        Raises:
            RequestError: the server gave up.
        """
        while self.open:
            item = await self.arrived.get()
            if isinstance(item, RequestError):
                raise item
            # Tokens that were under way when a response was cut are dropped.
            choice, token = item
            if choice in self.open:
                if token.is_last:
                    del self.open[choice]
                yield item

    def cut(self, choice: int) -> None:
        """End a response: its text is complete, whatever the engine would add."""
        if (request_id := self.open.pop(choice, None)) is not None:
            self._service.cancel([request_id])

    def close(self) -> None:
        """End the responses that nobody waits for any more."""
        if self.open:
            self._service.counts["abandoned_requests_total"] += 1
            self._service.cancel(list(self.open.values()))
        self.open.clear()


class Service:
    """The responses under way; the web server's event loop calls all but `deliver` and `give_up`.

    Args:
        capacity: responses that may be under way or wait.
    """

    def __init__(self, queue: CommandQueue, *, capacity: int, stop_ids: frozenset[int]) -> None:
        self.counts: Counter[str] = Counter()
        """Since the start, for Prometheus; a label stands in the name: `requests_total{status="200"}`."""
        self.stop_ids = stop_ids
        self.closed_because = ""
        """Why no request is taken; empty: they are."""
        self.capacity = capacity
        self._queue = queue
        self._loop: asyncio.AbstractEventLoop | None = None
        self._next_id = itertools.count()
        self._pending: dict[int, tuple[PendingResponses, int]] = {}
        """By request id: the responses of its request, and which of them it is."""

    @property
    def num_open(self) -> int:
        """Return the responses under way or waiting."""
        return len(self._pending)

    def check_room(self, num_responses: int) -> None:
        """Refuse responses that cannot be taken now.

        Raises:
            RequestError: the server is full, or about to end.
        """
        if self.closed_because:
            raise RequestError(self.closed_because, 503)
        if self.num_open + num_responses > self.capacity:
            asked = f"{self.num_open} responses are under way or wait and {num_responses} more are asked for"
            raise RequestError(f"{asked}; this server takes {self.capacity}: try again later", 503)

    def submit(self, prompt: Prompt, draws: Sequence[Draw], max_response_tokens: int) -> PendingResponses:
        """Queue the responses to a checked prompt, one for each draw.

        Raises:
            RequestError: the server is full, or about to end.
        """
        self.check_room(len(draws))
        self._loop = asyncio.get_running_loop()
        requests = [Request(next(self._next_id), prompt, draw, max_response_tokens) for draw in draws]
        # Known before the engine has them: its thread may deliver at once.
        responses = PendingResponses(self, [request.request_id for request in requests])
        self._pending |= {request.request_id: (responses, choice) for choice, request in enumerate(requests)}
        self.counts["prompt_tokens_total"] += len(prompt.token_ids)
        self._queue.put(new=requests)
        return responses

    def cancel(self, request_ids: Sequence[int]) -> None:
        """End responses that are not wanted any more."""
        known = [request_id for request_id in request_ids if self._pending.pop(request_id, None)]
        if known:
            self._queue.put(cancelled=known)

    def deliver(self, tokens: list[DrawnToken]) -> None:
        """Hand over the tokens of a step; called by the engine's thread."""
        self._call_in_loop(lambda: self._hand_out(tokens))

    def give_up(self, reason: str) -> None:
        """End all responses with an error, and take no more; called by the engine's thread."""
        self.closed_because = self.closed_because or reason
        self._call_in_loop(lambda: self._fail(reason))

    def _call_in_loop(self, function: Callable[[], None]) -> None:
        # asyncio's queues are not for threads. Without a loop there was no request yet, so nobody waits.
        if self._loop is not None:
            self._loop.call_soon_threadsafe(function)

    def _hand_out(self, tokens: list[DrawnToken]) -> None:
        self.counts["generated_tokens_total"] += len(tokens)
        for token in tokens:
            responses, choice = self._pending.get(token.request_id, (None, 0))
            if responses is None:
                continue  # cancelled while the step ran
            if token.is_last:
                del self._pending[token.request_id]
            responses.arrived.put_nowait((choice, token))

    def _fail(self, reason: str) -> None:
        for responses in {responses for responses, _ in self._pending.values()}:
            responses.arrived.put_nowait(RequestError(reason, 503))
        self._pending.clear()
