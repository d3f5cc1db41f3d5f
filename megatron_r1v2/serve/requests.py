"""What the servers share: bodies within limits, chat messages with images, errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import io
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from megatron_r1v2.data.images import decode_image
from megatron_r1v2.data.samples import ROLES, SampleError

BODY_SECONDS = 60.0
"""A client that sends its request more slowly is told so."""
RETRY_AFTER_SECONDS = 5
# Largest bodies that are held at once, all requests together; many more small ones fit.
_BODIES_AT_ONCE = 16
_DATA_URL = re.compile(r"data:image/(?:png|jpeg|jpg|webp);base64,", re.IGNORECASE)


class BadRequest(ValueError):
    """The client's mistake, with the HTTP status that says so."""

    def __init__(self, message: str, status: int = 400, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        """The field at fault, where it is one."""


class Unavailable(RuntimeError):
    """The server cannot take or finish a request now; the client may try again."""


@dataclass(frozen=True)
class Limits:
    """What one request may hold; more is refused before it costs memory."""

    body_bytes: int = 64 * 2**20
    images: int = 16
    image_pixels: int = 40_000_000
    """Width x height of one image, read from its header before it is decoded."""
    messages: int = 256


@dataclass(frozen=True)
class Turn:
    """One chat message; text and images in the order in which they stand."""

    role: str
    parts: tuple[str | Image.Image, ...]


def json_endpoint(
    answer: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]], *, bodies: BodyReader, api_key: str = ""
) -> Callable[[Request], Awaitable[Response]]:
    """Make a handler that reads a JSON object, asks for the answer and tells mistakes of the client as such.

    Args:
        answer: from the request's object to the answer's; raises BadRequest.
        bodies: reads them; shared by the endpoints of a server.
        api_key: that the client must send as a bearer token; empty: none.

    Returns:
        A handler of Starlette.
    """

    async def handle(request: Request) -> Response:
        try:
            check_key(request, api_key)
            async with bodies.read(request) as content:
                return JSONResponse(await answer(content))
        except BadRequest as error:
            return error_response(error.status, str(error), param=error.param)
        except Unavailable as error:
            return unavailable_response(error)

    return handle


def check_key(request: Request, api_key: str) -> None:
    """Refuse a request without the server's key.

    Raises:
        BadRequest: 401.
    """
    sent = request.headers.get("authorization", "")
    if api_key and not hmac.compare_digest(sent.encode(), f"Bearer {api_key}".encode()):
        raise BadRequest("the Authorization header does not hold this server's key, as 'Bearer KEY'", 401)


class BodyReader:
    """Reads bodies within limits: on the bytes of one, on what is held of all at once, and on time."""

    def __init__(self, limits: Limits, *, most_held: int) -> None:
        """Hold nothing yet.

        Args:
            limits: on one body.
            most_held: whole bodies that are held at once.
        """
        self._most_bytes = limits.body_bytes
        self._most_held = most_held
        self._bytes = 0
        self._held = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[dict[str, Any]]:
        """Read a body as a JSON object, no further than the limits, and count it as held until the block ends.

        Raises:
            BadRequest: 413 when it is larger, 408 when it comes too slowly, 400 when it is no JSON object.
            Unavailable: the server holds as much as it can.
        """
        body = bytearray()
        size = whole = 0
        try:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    async for part in request.stream():
                        body += part
                        size += len(part)
                        self._bytes += len(part)
                        self._check(size)
            except TimeoutError as error:
                raise BadRequest(f"the body did not arrive within {BODY_SECONDS:g} s", 408) from error
            content = _json_object(body)
            body.clear()
            # One that is still on its way takes no other's place.
            if self._held >= self._most_held:
                raise Unavailable(f"{self._held} requests wait to be read; try again later")
            whole = 1
            self._held += whole
            yield content
        finally:
            self._bytes -= size
            self._held -= whole

    def _check(self, size: int) -> None:
        if size > self._most_bytes:
            raise BadRequest(f"the body is larger than {self._most_bytes} bytes; send fewer or smaller images", 413)
        most = self._most_bytes * _BODIES_AT_ONCE
        if self._bytes > most:
            raise Unavailable(f"more than {most} bytes of requests are on their way at once; try again later")


def _json_object(body: bytearray) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadRequest(f"the body must be a JSON object, got {type(content).__name__}")
    return content


def error_response(
    status: int, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return an error as OpenAI's clients read it."""
    return JSONResponse(error_body(status, message, param=param), status, headers)


def unavailable_response(error: Unavailable) -> JSONResponse:
    """Tell a client to come again."""
    return error_response(503, str(error), headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


def error_body(status: int, message: str, *, param: str | None = None) -> dict[str, Any]:
    """Return the JSON of an error.

    Args:
        status: of HTTP.
        message: which may quote what the client sent, valid Unicode or not.
        param: the field at fault, where it is one; it may be a name of the client's.
    """
    kind = "server_error" if status >= 500 else "invalid_request_error"
    named = None if param is None else _sendable(param)
    return {"error": {"message": _sendable(message), "type": kind, "param": named, "code": status}}


def _sendable(text: str) -> str:
    """Write out what is not Unicode, such as half of a surrogate pair."""
    return text.encode(errors="backslashreplace").decode()


def read_messages(content: dict[str, Any], limits: Limits) -> list[Turn]:
    """Read the chat messages of a request and decode their images.

    Args:
        content: the request.
        limits: on messages and images.

    Returns:
        The turns, at least one.

    Raises:
        BadRequest: naming the message and what is accepted.
    """
    messages = content.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list with at least one message")
    if len(messages) > limits.messages:
        raise BadRequest(f"{len(messages)} messages; accepted: at most {limits.messages}", 413)
    turns = [_turn(message, f"messages[{index}]", limits) for index, message in enumerate(messages)]
    images = sum(isinstance(part, Image.Image) for turn in turns for part in turn.parts)
    if images > limits.images:
        raise BadRequest(f"{images} images; accepted: at most {limits.images}", 413)
    return turns


def image_from_data_url(url: object, where: str, limits: Limits) -> Image.Image:
    """Decode an image that came in the request; nothing is ever fetched.

    Args:
        url: data:image/png;base64,... (or jpeg, webp).
        where: what to call it in an error.
        limits: on its pixels.

    Returns:
        An RGB image.

    Raises:
        BadRequest: another address, bad base64, no image, or too many pixels.
    """
    if not isinstance(url, str) or not (head := _DATA_URL.match(url)):
        told = url[:60] if isinstance(url, str) else type(url).__name__
        raise BadRequest(
            f"{where}: got {told!r}; accepted: data:image/png;base64,... (or jpeg, webp). This server fetches nothing"
        )
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"{where}: not base64: {error}") from error
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            pixels = image.width * image.height
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadRequest(f"{where}: no PNG, JPEG or WebP image ({len(data)} bytes)") from error
    if pixels > limits.image_pixels:
        raise BadRequest(f"{where}: {pixels} pixels; accepted: at most {limits.image_pixels}", 413)
    try:
        return decode_image(data, where)
    except SampleError as error:
        raise BadRequest(str(error)) from error


def _turn(message: object, where: str, limits: Limits) -> Turn:
    if not isinstance(message, dict):
        raise BadRequest(f"{where}: a message is an object with role and content, got {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role == "developer":
        role = "system"  # its name for newer models of OpenAI's
    if role not in ROLES:
        raise BadRequest(
            f"{where}.role={str(role)[:60]!r}; accepted: {', '.join(ROLES)}, and developer, which is system; "
            "this server calls no tools"
        )
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise BadRequest(f"{where}.{name} is not supported: this server calls no tools; leave it out")
    if role == "assistant" and content is None:
        content = ""
    if isinstance(content, str):
        return Turn(role, (content,))
    if not isinstance(content, list):
        raise BadRequest(f"{where}.content must be text or a list of parts, got {type(content).__name__}")
    if sum(isinstance(part, dict) and part.get("type") == "image_url" for part in content) > limits.images:
        raise BadRequest(f"{where}: more than {limits.images} images", 413)
    parts = [_part(part, f"{where}.content[{index}]", limits) for index, part in enumerate(content)]
    return Turn(role, tuple(parts))


def _part(part: object, where: str, limits: Limits) -> str | Image.Image:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if isinstance(part, dict) and part.get("type") == "image_url":
        url = part.get("image_url")
        return image_from_data_url(url.get("url") if isinstance(url, dict) else url, where, limits)
    raise BadRequest(
        f'{where}: accepted are {{"type": "text", "text": ...}} and '
        '{"type": "image_url", "image_url": {"url": ...}}'
    )
