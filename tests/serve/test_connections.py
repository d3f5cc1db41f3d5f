"""Connections that only wait: closed in time, and never in the way of a client that asks."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from megatron_r1v2.serve.connections import Connection, web_config
from megatron_r1v2.serve.requests import BodyReader, Limits, json_endpoint

SECONDS = 0.5
MOST = 20
BODY_BYTES = 100_000


class Quick(Connection):
    header_seconds = SECONDS


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    async def echo(content):
        return content

    async def health(request):
        return JSONResponse({"status": "ok"})

    bodies = BodyReader(Limits(body_bytes=BODY_BYTES), most_held=MOST)
    routes = [Route("/health", health), Route("/echo", json_endpoint(echo, bodies=bodies), methods=["POST"])]
    config = web_config(Starlette(routes=routes), connections=MOST)
    config.http = Quick
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield listener.getsockname()
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def connect(address, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(address, timeout=10)
    connection.sendall(sent)
    return connection


def rest(connection: socket.socket) -> bytes:
    """Return what still comes until the server closes."""
    told = b""
    try:
        while part := connection.recv(65536):
            told += part
    except ConnectionResetError:
        pass
    return told


def is_healthy(address) -> bool:
    return httpx.get(f"http://{address[0]}:{address[1]}/health").json() == {"status": "ok"}


def test_who_says_nothing_is_closed_without_a_word(address):
    started = time.monotonic()
    assert rest(connect(address)) == b""
    assert SECONDS * 0.9 < time.monotonic() - started < SECONDS + 5


def test_headers_that_come_too_slowly_are_told_so(address):
    connection = connect(address, b"GET /health HTTP/1.1\r\nHost: x\r\n")
    started = time.monotonic()
    while time.monotonic() - started < SECONDS / 2:
        connection.sendall(b"X-More: 1\r\n")  # a byte now and then does not prolong it
        time.sleep(SECONDS / 10)
    head, _, body = rest(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert "did not arrive within 0.5 s" in json.loads(body)["error"]["message"]
    assert time.monotonic() - started < SECONDS + 5


def test_the_next_request_of_a_connection_is_waited_for_as_long_as_the_first(address):
    request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    connection = connect(address, request)
    for _ in range(4):
        time.sleep(SECONDS * 0.6)
        connection.sendall(request)
    told = b""
    while told.count(b"HTTP/1.1 200 ") < 5 or not told.endswith(b'{"status":"ok"}'):
        told += connection.recv(65536)
    started = time.monotonic()
    assert rest(connection) == b""
    assert time.monotonic() - started < SECONDS + 5


def test_what_is_no_http_is_refused_as_json(address):
    head, _, body = rest(connect(address, b"nonsense\r\n\r\n")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == 400


def test_a_body_may_take_longer_than_headers(address):
    connection = connect(address, b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\n")
    for part in (b'{"a"', b": 1}"):
        time.sleep(SECONDS * 1.5)
        connection.sendall(part)
    assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /health HTTP/1.1\r\n", b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"],
    ids=["nothing", "half of the headers", "half of a body"],
)
def test_many_that_wait_make_room_for_one_that_asks(address, sent):
    waiting = [connect(address, sent) for _ in range(10 * MOST)]
    assert is_healthy(address)
    # The oldest went first; the newest are heard still.
    assert rest(waiting[0]) == b""
    rest_of_last = {b"": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"}.get(sent, b"Host: x\r\n\r\n")
    if not sent.startswith(b"POST"):
        waiting[-1].sendall(rest_of_last)
        assert waiting[-1].recv(65536).startswith(b"HTTP/1.1 200 ")
    for connection in waiting:
        connection.close()


def test_bodies_that_are_held_at_once_are_bounded(address):
    """Sixteen largest ones: what goes beyond is told to come again, and the room is there again afterwards."""
    head = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % BODY_BYTES
    waiting = [connect(address, head + b" " * (BODY_BYTES - 2)) for _ in range(18)]
    outcomes = []
    for connection in waiting:
        connection.settimeout(0.5)
        try:
            outcomes.append(connection.recv(65536))
        except TimeoutError:
            outcomes.append(b"")
    refused = [told for told in outcomes if told]
    assert outcomes.count(b"") == 16
    assert len(refused) == 2
    for told in refused:
        assert told.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 5" in told
    for connection in waiting:
        connection.close()
    deadline = time.monotonic() + 10
    while httpx.post(f"http://{address[0]}:{address[1]}/echo", content=b"{}" + b" " * 99_000).status_code != 200:
        assert time.monotonic() < deadline


def test_a_body_larger_than_the_limit_is_refused(address):
    answer = httpx.post(f"http://{address[0]}:{address[1]}/echo", content=b" " * (BODY_BYTES + 1))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, 413)
