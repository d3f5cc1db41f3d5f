"""Requests between the web server and the engine: a bounded queue in, the tokens of each response out."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from megatron_r1v2.generation.controller import DrawnToken
from megatron_r1v2.generation.engine import Request
from megatron_r1v2.generation.sampling import Draw
from megatron_r1v2.serve.engine_loop import Inbox
from megatron_r1v2.serve.metrics import ServerMetrics
from megatron_r1v2.serve.requests import Unavailable
from megatron_r1v2.types import Prompt


@dataclass(frozen=True)
class ChoiceToken:
    """A token of one of the responses to a request."""

    choice: int
    token: DrawnToken


class Job:
    """A request with its responses, which the engine generates side by side."""

    def __init__(self, service: Service, request_ids: Sequence[int]) -> None:
        """Open it.

        Args:
            service: to tell when a response is not wanted any more.
            request_ids: of the engine, one for each response.
        """
        self.arrived: asyncio.Queue[ChoiceToken | Unavailable] = asyncio.Queue()
        self.open = dict(enumerate(request_ids))
        """Responses that have not ended, by number."""
        self._service = service

    async def tokens(self) -> AsyncIterator[ChoiceToken]:
        """Yield tokens as they come, until all responses have ended.

        Raises:
            Unavailable: the server gave up.
        """
        while self.open:
            item = await self.arrived.get()
            if isinstance(item, Unavailable):
                raise item
            # What was under way when a response was cut is not told.
            if item.choice in self.open:
                if item.token.is_last:
                    del self.open[item.choice]
                yield item

    def cut(self, choice: int) -> None:
        """End a response: its text is complete, whatever the engine would add."""
        if (request_id := self.open.pop(choice, None)) is not None:
            self._service.cancel([request_id])

    def close(self) -> None:
        """End the responses that nobody waits for any more."""
        self._service.abandon(list(self.open.values()))
        self.open.clear()


class Service:
    """Knows every response under way. All but `deliver` and `give_up` is called by the web server's event loop."""

    def __init__(self, inbox: Inbox, metrics: ServerMetrics, *, capacity: int, stop_ids: frozenset[int]) -> None:
        """Open it, with nothing under way.

        Args:
            inbox: of the engine.
            metrics: kept up to date.
            capacity: responses that may be under way or wait.
            stop_ids: tokens that end a response.
        """
        self.stop_ids = stop_ids
        self.capacity = capacity
        self.closed_because = ""
        """Why no request is taken; empty: they are."""
        self._inbox = inbox
        self._metrics = metrics
        self._loop: asyncio.AbstractEventLoop | None = None
        self._next_id = itertools.count()
        self._jobs: dict[int, tuple[Job, int]] = {}
        """By request id: the job, and which of its responses it is."""

    @property
    def num_open(self) -> int:
        """Return the responses under way or waiting."""
        return len(self._jobs)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Say which event loop the web server runs in."""
        self._loop = loop

    def check_room(self, num_responses: int) -> None:
        """Refuse what cannot be taken now.

        Raises:
            Unavailable: the server is full, or about to end.
        """
        if self.closed_because:
            raise Unavailable(self.closed_because)
        if self.num_open + num_responses > self.capacity:
            raise Unavailable(
                f"{self.num_open} responses are under way or wait and {num_responses} more are asked for; this server "
                f"takes {self.capacity}: try again later"
            )

    def submit(self, prompt: Prompt, draws: Sequence[Draw], max_response_tokens: int) -> Job:
        """Queue the responses to a prompt.

        Args:
            prompt: checked.
            draws: one for each response.
            max_response_tokens: of each.

        Raises:
            Unavailable: the server is full, or about to end.
        """
        self.check_room(len(draws))
        requests = [Request(next(self._next_id), prompt, draw, max_response_tokens) for draw in draws]
        job = Job(self, [request.request_id for request in requests])
        for choice, request in enumerate(requests):
            self._jobs[request.request_id] = (job, choice)
        self._metrics.open_responses.set(self.num_open)
        self._inbox.add(requests)
        return job

    def cancel(self, request_ids: Sequence[int]) -> None:
        """End responses that are not wanted any more."""
        known = [request_id for request_id in request_ids if self._jobs.pop(request_id, None)]
        self._metrics.open_responses.set(self.num_open)
        if known:
            self._inbox.cancel(known)

    def abandon(self, request_ids: Sequence[int]) -> None:
        """End what is left of a request whose client does not wait any more."""
        if request_ids:
            self._metrics.abandoned.inc()
            self.cancel(request_ids)

    def deliver(self, tokens: list[DrawnToken]) -> None:
        """Hand over the tokens of a step; called by the engine's thread."""
        self._in_loop(self._hand_out, tokens)

    def give_up(self, reason: str) -> None:
        """End all responses with an error, and take no more; called by the engine's thread."""
        self._in_loop(self._fail, reason)

    def _in_loop(self, function: Callable[..., None], argument: list[DrawnToken] | str) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(function, argument)

    def _hand_out(self, tokens: list[DrawnToken]) -> None:
        self._metrics.generated_tokens.inc(len(tokens))
        for token in tokens:
            job, choice = self._jobs.get(token.request_id, (None, 0))
            if job is None:
                continue  # cancelled while the step ran
            if token.is_last:
                del self._jobs[token.request_id]
            job.arrived.put_nowait(ChoiceToken(choice, token))
        self._metrics.open_responses.set(self.num_open)

    def _fail(self, reason: str) -> None:
        self.closed_because = self.closed_because or reason
        for job in {id(job): job for job, _ in self._jobs.values()}.values():
            job.arrived.put_nowait(Unavailable(reason))
        self._jobs.clear()
