"""The web side of both servers: uvicorn's settings, the limit on a body, the key, and errors in OpenAI's shape.

Clients that send slowly, or connect and say nothing, are the business of a proxy in front of a server.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_SECONDS = 60.0
"""A client that sends its request more slowly is refused with 408."""
BODIES_AT_ONCE = 16
"""Requests that are read at once; each may hold a whole body. The others wait, unread."""
CLIENT_LEFT = 499
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}
# Longer than clients keep an idle connection (5 s in httpx): a request must not meet one that is being closed.
_KEEP_ALIVE_SECONDS = 30
_MAX_HEADER_BYTES = 2**15


class RequestError(Exception):
    """The end of a request by an HTTP error: 4xx for the client's mistake, 5xx when it may try again."""

    def __init__(self, message: str, status: int = 400, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        """The field at fault, where it is one."""


def uvicorn_config(app: ASGIApp, *, connections: int, graceful_seconds: int | None = None) -> uvicorn.Config:
    """Return how uvicorn runs a server.

    Args:
        connections: beyond so many uvicorn itself answers 503, to /health too.
        graceful_seconds: for answers under way at the end; None: as long as they take.
    """
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        limit_concurrency=connections,
        backlog=connections,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=graceful_seconds,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        log_level="warning",
        access_log=False,
    )


def web_app(routes: Sequence[BaseRoute], *, max_body_mib: float) -> Starlette:
    """Return an application that limits bodies and answers its errors as OpenAI does."""
    return Starlette(
        routes=routes,
        middleware=[Middleware(BodyLimit, max_bytes=int(max_body_mib * 2**20))],
        exception_handlers={
            RequestError: _request_error,
            HTTPException: _http_error,
            ClientDisconnect: _client_left,
            Exception: _own_error,
        },
    )


class BodyLimit:
    """ASGI middleware that ends the reading of a body that is too large: uvicorn has no such limit."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; its reader gets RequestError (413) as soon as the body is known to be too large."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # uvicorn has checked that it is a number. An announced size counts before a byte of it is held.
        announced, received = int(Headers(scope=scope).get("content-length", "0")), 0

        async def receive_within() -> Message:
            nonlocal received
            message = await receive() if announced <= self._max_bytes else {}
            received += len(message.get("body", b""))
            if max(announced, received) > self._max_bytes:
                raise RequestError(
                    f"the body is larger than {self._max_bytes} bytes; send fewer or smaller images", 413
                )
            return message

        await self._app(scope, receive_within, send)


def check_key(request: Request, api_key: str) -> None:
    """Refuse a request without the server's key; "": the server has none.

    Raises:
        RequestError: 401.
    """
    sent = request.headers.get("authorization", "")
    if api_key and not hmac.compare_digest(sent.encode(), f"Bearer {api_key}".encode()):
        raise RequestError("the Authorization header does not hold this server's key, as 'Bearer KEY'", 401)


async def read_json(request: Request) -> dict[str, object]:
    """Read a body that is a JSON object.

    Raises:
        RequestError: 408 when it comes too slowly, 400 when it is not a JSON object.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await request.body()
    except TimeoutError as error:
        raise RequestError(f"the body did not arrive within {BODY_SECONDS:g} s", 408) from error
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise RequestError(f"the body must be a JSON object, got {type(content).__name__}")
    return content


def error_body(status: int, message: str, *, param: str | None = None) -> dict[str, object]:
    """Return an error as OpenAI's clients read it; message and param may quote the client, valid Unicode or not."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    # Half of a surrogate pair cannot be sent: it is written out.
    message, named = (text.encode(errors="backslashreplace").decode() for text in (message, param or ""))
    return {"error": {"message": message, "type": kind, "param": named or None, "code": status}}


async def _request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    body = error_body(error.status, str(error), param=error.param)
    return JSONResponse(body, error.status, _HEADERS.get(error.status))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(error_body(error.status_code, message), error.status_code, error.headers)


async def _client_left(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _own_error(request: Request, _: Exception) -> Response:
    """Answer where the server itself is at fault; its log has the traceback."""
    message = f"{request.method} {request.url.path}: the server failed; its log says why"
    return JSONResponse(error_body(500, message), 500)
