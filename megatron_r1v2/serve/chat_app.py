"""The endpoints of a chat server: /v1/chat/completions and /v1/models as OpenAI has them, /health and /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import anyio
from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from megatron_r1v2.data.prompts import PromptBuilder
from megatron_r1v2.generation.sampling import Draw, response_key
from megatron_r1v2.serve.chat_answer import STREAM_END, ChatAnswer, event
from megatron_r1v2.serve.chat_request import ChatRequest, Defaults, read_chat_request
from megatron_r1v2.serve.chat_text import ChoiceText, Decode, Piece
from megatron_r1v2.serve.metrics import ServerMetrics
from megatron_r1v2.serve.requests import (
    BadRequest,
    BodyReader,
    Limits,
    Unavailable,
    check_key,
    error_body,
    error_response,
    unavailable_response,
)
from megatron_r1v2.serve.service import Job, Service
from megatron_r1v2.types import Prompt

# Requests whose images are decoded, tiled and tokenized at once: each may hold a whole body and its pictures.
_PREPARED_AT_ONCE = 4
_CLIENT_LEFT = 499


@dataclass(frozen=True)
class ChatModel:
    """What the endpoints know of the model."""

    defaults: Defaults
    builder: PromptBuilder
    check: Callable[[Prompt], None]
    """Raises ValueError for a prompt that the engine cannot take."""
    decode: Decode
    version: int
    """Optimizer steps behind the weights: a part of the name of each response in the sampling."""
    reasoning_ends: str = ""
    """Text between reasoning and answer, where they are told apart; empty: they are not."""


class ChatServer:
    """Handles requests; all of it runs in one event loop."""

    def __init__(
        self,
        model: ChatModel,
        service: Service,
        metrics: ServerMetrics,
        *,
        limits: Limits,
        api_key: str = "",
        request_seconds: float = 3600.0,
    ) -> None:
        """Prepare.

        Args:
            model: what is served.
            service: the way to the engine.
            metrics: kept up to date.
            limits: on requests.
            api_key: that clients must send; empty: none.
            request_seconds: a request that takes longer is ended.
        """
        self._model = model
        self._service = service
        self._metrics = metrics
        self._limits = limits
        self._bodies = BodyReader(limits, most_held=service.capacity)
        self._api_key = api_key
        self._request_seconds = request_seconds
        self._preparing = anyio.CapacityLimiter(_PREPARED_AT_ONCE)

    @property
    def model_name(self) -> str:
        """Return what clients call the model."""
        return self._model.defaults.model

    def app(self) -> Starlette:
        """Return the ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
                Route("/v1/models", self._answer_errors(self.models), methods=["GET"]),
                Route("/health", self.health, methods=["GET"]),
                Route("/metrics", self.prometheus, methods=["GET"]),
            ],
            exception_handlers={HTTPException: _http_error, Exception: _own_error},
            lifespan=self._lifespan,
        )

    async def models(self, request: Request) -> Response:
        """Name the model."""
        check_key(request, self._api_key)
        card = {"id": self.model_name, "object": "model", "created": 0, "owned_by": "megatron_r1v2"}
        return JSONResponse({"object": "list", "data": [card]})

    async def health(self, request: Request) -> Response:
        """Say whether requests are taken."""
        if self._service.closed_because:
            return JSONResponse({"status": self._service.closed_because}, 503)
        return JSONResponse({"status": "ok", "model": self.model_name})

    async def prometheus(self, request: Request) -> Response:
        """Tell the counters."""
        return Response(self._metrics.text(), media_type=self._metrics.content_type)

    async def complete(self, request: Request) -> Response:
        """Answer a chat completion request."""
        status = 500
        try:
            response = await self._answer_errors(self._complete)(request)
            status = response.status_code
            return response
        finally:
            self._metrics.requests.labels(status=str(status)).inc()

    async def _complete(self, request: Request) -> Response:
        started = time.monotonic()
        check_key(request, self._api_key)
        self._service.check_room(1)  # before the body costs anything
        async with self._bodies.read(request) as content:
            asked, prompt = await anyio.to_thread.run_sync(self._prepare, content, limiter=self._preparing)
        job = self._service.submit(prompt, self._draws(asked, prompt), asked.max_tokens)
        self._metrics.prompt_tokens.inc(len(prompt.token_ids))
        answering = _Answering(self, asked, job, len(prompt.token_ids), started)
        if asked.stream:
            return _EventStream(answering.stream(), job)
        try:
            body = await _unless_disconnected(request, answering.whole())
        finally:
            job.close()
        if body is None:
            return Response(status_code=_CLIENT_LEFT)
        return JSONResponse(body)

    def _prepare(self, content: dict[str, Any]) -> tuple[ChatRequest, Prompt]:
        """Check a request, and template, tile and tokenize its prompt; runs in a thread of its own."""
        asked = read_chat_request(content, self._model.defaults, self._limits)
        try:
            token_ids, tiles_TCHW = self._model.builder.encode("request", asked.messages, asked.images)
            # The same question has the same name, so that a seed gives the same response again.
            name = hashlib.blake2b(digest_size=16)
            name.update(repr(token_ids).encode())
            name.update(tiles_TCHW.numpy().tobytes())
            prompt = Prompt(
                key=name.hexdigest(),
                messages=asked.messages,
                token_ids=token_ids,
                tiles_TCHW=tiles_TCHW,
            )
            self._model.check(prompt)
        except (ValueError, TemplateError) as error:
            raise BadRequest(f"messages: {error}", param="messages") from error
        return asked, prompt

    def _draws(self, asked: ChatRequest, prompt: Prompt) -> list[Draw]:
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        return [
            Draw(
                response_key(seed, self._model.version, prompt.key, choice),
                asked.temperature,
                asked.top_p,
                asked.num_alternatives or 0,
            )
            for choice in range(asked.num_choices)
        ]

    def _answer_errors(
        self, handle: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except BadRequest as error:
                headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
                return error_response(error.status, str(error), param=error.param, headers=headers)
            except Unavailable as error:
                return unavailable_response(error)
            except TimeoutError:
                return error_response(504, _too_long(self._request_seconds))
            except ClientDisconnect:
                return Response(status_code=_CLIENT_LEFT)

        return handler

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._service.attach(asyncio.get_running_loop())
        yield


class _Answering:
    """The way of one request from tokens to its answer."""

    def __init__(self, server: ChatServer, asked: ChatRequest, job: Job, prompt_tokens: int, started: float) -> None:
        self._server = server
        self._job = job
        self._asked = asked
        self._started = started
        model = server._model
        self._choices = [
            ChoiceText(model.decode, stop_ids=server._service.stop_ids, stop=asked.stop)
            for _ in range(asked.num_choices)
        ]
        self._answer = ChatAnswer(
            model=model.defaults.model,
            decode=model.decode,
            prompt_tokens=prompt_tokens,
            num_choices=asked.num_choices,
            num_alternatives=asked.num_alternatives,
            reasoning_ends=model.reasoning_ends,
        )

    async def whole(self) -> dict[str, Any]:
        """Return the answer when all responses have ended.

        Raises:
            TimeoutError: they take too long.
            Unavailable: the server gave up.
        """
        pieces: list[list[Piece]] = [[] for _ in self._choices]
        async for index, piece in self._pieces():
            pieces[index].append(piece)
        return self._answer.whole(self._choices, pieces)

    async def stream(self) -> AsyncIterator[str]:
        """Yield server-sent events; an error after the first is an event too."""
        for index in range(len(self._choices)):
            yield event(self._answer.opening(index))
        try:
            async for index, piece in self._pieces():
                finish_reason = self._choices[index].finish_reason
                if piece.text or piece.tokens or finish_reason:
                    yield event(self._answer.piece(index, piece, finish_reason))
            if self._asked.include_usage:
                yield event(self._answer.usage_chunk(self._choices))
            yield STREAM_END
        except Unavailable as error:
            yield event(error_body(503, str(error)))
        except TimeoutError:
            yield event(error_body(504, _too_long(self._server._request_seconds)))

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        metrics = self._server._metrics
        deadline = asyncio.get_running_loop().time() + self._server._request_seconds
        tokens = self._job.tokens()
        is_first = True
        while (item := await _before(deadline, anext(tokens, None))) is not None:
            if is_first:
                metrics.first_token_seconds.observe(time.monotonic() - self._started)
                is_first = False
            choice = self._choices[item.choice]
            piece = choice.push(item.token)
            if choice.finish_reason:
                self._job.cut(item.choice)
            yield item.choice, piece
        metrics.request_seconds.observe(time.monotonic() - self._started)


class _EventStream(StreamingResponse):
    """Server-sent events, whose end, whatever it is, ends the request."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[str], job: Job) -> None:
        super().__init__(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._job = job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.close()


async def _before(deadline: float, waiting: Awaitable[Any]) -> Any:
    async with asyncio.timeout_at(deadline):
        return await waiting


async def _unless_disconnected(request: Request, answer: Awaitable[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the answer, or None when the client leaves before."""
    answering = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else None
    finally:
        for task in (answering, leaving):
            task.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_long(seconds: float) -> str:
    return f"the request took longer than {seconds:g} s (--request-seconds of the server) and was ended"


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(
        error.status_code, f"{request.method} {request.url.path}: {error.detail}", headers=error.headers
    )


async def _own_error(request: Request, error: Exception) -> Response:
    """Answer where the server itself is at fault; what happened stands in its log."""
    return error_response(500, f"{request.method} {request.url.path}: the server failed; its log says why")
