"""The limits of a server by uvicorn's own settings, the limit on bodies, keys, and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from megatron_r1v2.serve import web
from tests.serve.running import get, post

MOST = 20
BODY_BYTES = 100_000
POST = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    async def echo(request: Request):
        web.check_key(request, request.query_params.get("key", ""))
        return JSONResponse(await web.read_json(request))

    async def health(request: Request):
        return JSONResponse({"status": "ok"})

    async def fails(request: Request):
        raise ZeroDivisionError

    routes = [Route("/health", health), Route("/echo", echo, methods=["POST"]), Route("/fails", fails)]
    app = web.web_app(routes, max_body_mib=BODY_BYTES / 2**20)
    server = uvicorn.Server(web.uvicorn_config(app, connections=MOST, graceful_seconds=1))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield listener.getsockname()
    server.should_exit = True
    thread.join(120)
    assert not thread.is_alive()


def url(address, path: str) -> str:
    return f"http://{address[0]}:{address[1]}{path}"


def connect(address, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(address, timeout=60)
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


def test_the_limits_are_those_of_uvicorn():
    config = web.uvicorn_config(JSONResponse({}), connections=77, graceful_seconds=3)
    assert (config.limit_concurrency, config.backlog, config.timeout_graceful_shutdown) == (77, 77, 3)
    # httpx and openai close idle connections after 5 s: the server must not do it first.
    assert config.timeout_keep_alive > 5
    assert 2**13 < config.h11_max_incomplete_event_size < 2**17
    assert config.http == "h11", "another protocol has no limit on headers"


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /health HTTP/1.1\r\n", POST % 9 + b"{"],
    ids=["nothing", "half of the headers", "half of a body"],
)
def test_connections_that_wait_shut_nobody_out_up_to_the_limit(address, sent):
    waiting = [connect(address, sent) for _ in range(MOST - 2)]
    time.sleep(0.1)
    assert get(url(address, "/health")).json() == {"status": "ok"}
    more = [connect(address, sent) for _ in range(10)]
    deadline = time.monotonic() + 60
    while get(url(address, "/health")).status_code != 503:
        assert time.monotonic() < deadline
        more.append(connect(address, sent))  # one that met the limit was answered, and does not wait
    for connection in waiting + more:
        connection.close()
    deadline = time.monotonic() + 60
    while get(url(address, "/health")).status_code != 200:
        assert time.monotonic() < deadline


def test_headers_without_end_are_refused(address):
    connection = connect(address, b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 2**17)
    assert rest(connection).startswith(b"HTTP/1.1 400 ")


def test_what_is_no_http_is_refused(address):
    assert rest(connect(address, b"nonsense\r\n\r\n")).startswith(b"HTTP/1.1 400 ")


def test_a_connection_is_kept_for_the_next_request(address):
    connection = connect(address, GET)
    told = b""
    for _ in range(2):
        time.sleep(0.2)
        connection.sendall(GET)
    while told.count(b"HTTP/1.1 200 ") < 3 or not told.endswith(b'{"status":"ok"}'):
        told += connection.recv(65536)
    connection.close()


def chunks(size: int) -> Iterator[bytes]:
    yield b"{}"
    for _ in range(size // 1000):
        yield b" " * 1000


def test_a_body_larger_than_the_limit_is_refused(address):
    answer = post(url(address, "/echo"), content=b" " * (BODY_BYTES + 1))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, 413)
    assert "larger than 100000 bytes" in answer.json()["error"]["message"]
    # Without a length: as soon as it is too long.
    assert post(url(address, "/echo"), content=chunks(BODY_BYTES)).status_code == 413
    assert post(url(address, "/echo"), content=chunks(BODY_BYTES - 2000)).json() == {}
    assert post(url(address, "/echo"), content=b"{}" + b" " * (BODY_BYTES - 2)).json() == {}


def test_an_announced_body_that_is_too_large_is_refused_before_it_is_sent(address):
    with connect(address, POST % (BODY_BYTES + 1)) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_body_may_come_in_parts_but_not_too_slowly(address, monkeypatch):
    with connect(address, POST % 8) as connection:
        for part in (b'{"a"', b": 1}"):
            time.sleep(0.3)
            connection.sendall(part)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    monkeypatch.setattr(web, "BODY_SECONDS", 0.3)
    with connect(address, POST % 8 + b'{"a"') as connection:
        told = connection.recv(65536)
        assert told.startswith(b"HTTP/1.1 408 ")
        # The headers may come by themselves.
        told += b"" if b"0.3 s" in told else connection.recv(65536)
        assert b"did not arrive within 0.3 s" in told


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "not JSON"), (b"{", "not JSON"), (b"[" * 90_000, "not JSON"), (b"\xff", "not JSON"), (b"[]", "got list")],
    ids=["nothing", "half", "brackets", "no Unicode", "a list"],
)
def test_what_is_no_json_object_is_refused(address, content, told):
    answer = post(url(address, "/echo"), content=content)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert told in answer.json()["error"]["message"]


def test_a_key_is_asked_for(address):
    for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer guess"}, {"Authorization": "s"}):
        answer = post(url(address, "/echo?key=secret"), content=b"{}", headers=headers)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    answer = post(url(address, "/echo?key=secret"), content=b"{}", headers={"Authorization": "Bearer secret"})
    assert answer.status_code == 200
    # Headers are bytes of Latin-1: one beyond ASCII is compared, and no crash.
    answer = post(url(address, "/echo?key=secret"), content=b"{}", headers=[(b"Authorization", b"Bearer \xe9")])
    assert answer.status_code == 401


def test_errors_have_openais_shape(address):
    for path, status, told in (("/nowhere", 404, "GET /nowhere: Not Found"), ("/echo", 405, "GET /echo: Method Not")):
        answer = get(url(address, path))
        assert answer.status_code == status
        assert answer.json()["error"]["message"].startswith(told)
    answer = get(url(address, "/fails"))
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "its log says why" in answer.json()["error"]["message"]


def test_an_error_quotes_what_is_no_unicode():
    body = web.error_body(400, "unknown \ud800", param="\ud800")["error"]
    assert (body["message"], body["param"]) == ("unknown \\ud800", "\\ud800")
    assert json.dumps(body, ensure_ascii=False).encode()
    assert web.error_body(503, "later")["error"] == {
        "message": "later", "type": "server_error", "param": None, "code": 503,
    }  # fmt: skip


def test_who_may_try_again_is_told_when():
    error = web.RequestError("full", 503)
    response = asyncio.run(web.web_app([], max_body_mib=1).exception_handlers[web.RequestError](None, error))
    assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
    assert json.loads(response.body)["error"]["message"] == "full"
