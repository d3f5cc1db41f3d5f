"""The endpoints of a chat server: /v1/chat/completions and /v1/models as OpenAI has them, /health and /metrics."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Mapping

import anyio
from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from megatron_r1v2.generation.engine import RolloutEngine
from megatron_r1v2.generation.sampling import Draw, response_key
from megatron_r1v2.serve import web
from megatron_r1v2.serve.chat_answer import STREAM_END, ChatAnswer, Json, TextPiece, event
from megatron_r1v2.serve.chat_request import ChatRequest, read_chat_request, served_request
from megatron_r1v2.serve.options import ChatOptions
from megatron_r1v2.serve.service import ChoiceToken, PendingResponses, Service
from megatron_r1v2.stages.loaded_model import LoadedModel
from megatron_r1v2.types import Prompt

# Requests whose images are decoded, tiled and tokenized at once: each may hold many pictures.
_PREPARED_AT_ONCE = 4
_MAX_CHOICES = 128


class ChatServer:
    """The handlers of requests, all in one event loop.

    Args:
        engine: checks prompts; its steps are run elsewhere.
    """

    def __init__(
        self, loaded: LoadedModel, engine: RolloutEngine, service: Service, options: ChatOptions, key: str
    ) -> None:
        self._loaded = loaded
        self._engine = engine
        self._service = service
        self._options = options
        self._key = key
        most = min(_MAX_CHOICES, service.capacity)
        self._request = served_request(options.name, loaded.recipe.generation, max_choices=most)
        self._bodies = asyncio.Semaphore(web.BODIES_AT_ONCE)
        self._preparing = anyio.CapacityLimiter(_PREPARED_AT_ONCE)

    def app(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]
        return web.web_app(routes, max_body_mib=self._options.max_body_mib)

    async def models(self, request: Request) -> Response:
        """Name the model."""
        web.check_key(request, self._key)
        card = {"id": self._options.name, "object": "model", "created": 0, "owned_by": "megatron_r1v2"}
        return JSONResponse({"object": "list", "data": [card]})

    async def health(self, request: Request) -> Response:  # noqa: ARG002
        """Answer whether requests are taken."""
        if self._service.closed_because:
            return JSONResponse({"status": self._service.closed_because}, 503)
        return JSONResponse({"status": "ok", "model": self._options.name})

    async def metrics(self, request: Request) -> Response:  # noqa: ARG002
        """Return the counters, and the responses under way or waiting, in Prometheus' text format."""
        counts = {**self._service.counts, "open_responses": self._service.num_open}
        return PlainTextResponse("".join(f"r1v2_{name} {count}\n" for name, count in counts.items()))

    async def complete(self, request: Request) -> Response:
        """Answer a chat completion request, and count it."""
        status = 500
        try:
            response = await self._complete(request)
            status = response.status_code
            return response
        except web.RequestError as error:
            status = error.status
            raise
        except ClientDisconnect:
            status = web.CLIENT_LEFT
            raise
        finally:
            self._service.counts[f'requests_total{{status="{status}"}}'] += 1

    async def _complete(self, request: Request) -> Response:
        web.check_key(request, self._key)
        self._service.check_room(1)  # before the body costs anything
        async with self._bodies:
            content = await web.read_json(request)
            asked, prompt = await anyio.to_thread.run_sync(self._prepare, content, limiter=self._preparing)
        responses = self._service.submit(prompt, self._draws(asked, prompt), asked.response_tokens)
        tokenizer, ends = self._loaded.tokenizer, self._options.reasoning_ends
        hidden_ids = tokenizer.special_ids - tokenizer.special_ids_of([ends])
        answer = ChatAnswer(
            asked,
            decode=tokenizer.decode,
            prompt_tokens=len(prompt.token_ids),
            # The text, which is searched for stop strings, may lack the special tokens among them.
            stop_ids=self._service.stop_ids | tokenizer.special_ids_of(asked.stop),
            hidden_ids=hidden_ids if asked.skip_special_tokens else frozenset(),
            reasoning_ends=ends,
        )
        if asked.stream:
            return _EventStream(self._stream(answer, responses), responses)
        try:
            whole = await _unless_disconnected(request, self._whole(answer, responses))
        finally:
            responses.close()
        return Response(status_code=web.CLIENT_LEFT) if whole is None else JSONResponse(whole)

    def _prepare(self, content: Mapping[str, object]) -> tuple[ChatRequest, Prompt]:
        """Check a request, and template, tile and tokenize its prompt; runs in a thread of its own."""
        asked = read_chat_request(content, self._request)
        try:
            # What the model itself has said is taken back, whatever it has said.
            own = self._loaded.tokenizer.without_control
            messages = tuple(
                {**message, "content": own(message["content"])} if message["role"] == "assistant" else message
                for message in asked.messages
            )
            token_ids, tiles_TCHW = self._loaded.prompt_builder.encode("request", messages, asked.images)
            # The same question has the same name, so that a seed gives the same response again.
            name = hashlib.blake2b(digest_size=16)
            name.update(repr(token_ids).encode())
            name.update(tiles_TCHW.numpy().tobytes())
            prompt = Prompt(key=name.hexdigest(), messages=messages, token_ids=token_ids, tiles_TCHW=tiles_TCHW)
            self._engine.check(prompt)
        except (ValueError, TemplateError) as error:
            raise web.RequestError(f"messages: {error}", param="messages") from error
        return asked, prompt

    def _draws(self, asked: ChatRequest, prompt: Prompt) -> list[Draw]:
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        keys = [response_key(seed, self._loaded.version, prompt.key, choice) for choice in range(asked.n)]
        return [Draw(key, asked.temperature, asked.top_p, asked.top_logprobs) for key in keys]

    async def _whole(self, answer: ChatAnswer, responses: PendingResponses) -> Json:
        """Return the answer when all responses have ended."""
        pieces: list[list[TextPiece]] = [[] for _ in answer.choices]
        async for index, piece in self._pieces(answer, responses):
            pieces[index].append(piece)
        return answer.whole(pieces)

    async def _stream(self, answer: ChatAnswer, responses: PendingResponses) -> AsyncIterator[str]:
        """Yield server-sent events; an error after the first is an event too."""
        for index in range(len(answer.choices)):
            yield event(answer.opening(index))
        try:
            async for index, piece in self._pieces(answer, responses):
                if piece.text or piece.tokens or answer.choices[index].finish_reason:
                    yield event(answer.piece(index, piece))
            if answer.includes_usage:
                yield event(answer.usage_chunk())
            yield STREAM_END
        except web.RequestError as error:
            yield event(web.error_body(error.status, str(error)))

    async def _pieces(self, answer: ChatAnswer, responses: PendingResponses) -> AsyncIterator[tuple[int, TextPiece]]:
        """Yield what can be sent, as it comes.

        Raises:
            RequestError: the responses take too long (504), or the server gave up.
        """
        deadline = asyncio.get_running_loop().time() + self._options.request_seconds
        tokens = responses.tokens()
        while (item := await self._next_before(deadline, tokens)) is not None:
            index, token = item
            piece = answer.choices[index].push(token)
            if answer.choices[index].finish_reason:
                responses.cut(index)
            yield index, piece

    async def _next_before(self, deadline: float, tokens: AsyncIterator[ChoiceToken]) -> ChoiceToken | None:
        try:
            async with asyncio.timeout_at(deadline):
                return await anext(tokens, None)
        except TimeoutError as error:
            seconds = f"{self._options.request_seconds:g} s (--request-seconds of the server)"
            raise web.RequestError(f"the request took longer than {seconds} and was ended", 504) from error


class _EventStream(StreamingResponse):
    """Server-sent events, whose end, whatever it is, ends the request."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[str], responses: PendingResponses) -> None:
        super().__init__(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._responses = responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not in the generator: a client that leaves before its first line would never start it.
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._responses.close()


async def _unless_disconnected(request: Request, answer: Awaitable[Json]) -> Json | None:
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
