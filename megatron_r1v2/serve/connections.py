"""Connections to a web server: those that only wait are closed in time, and never shut out one that asks."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_r1v2.serve.requests import error_body


def web_config(app: Any, *, connections: int, **settings: Any) -> uvicorn.Config:
    """Return how a web server is run.

    Args:
        app: of ASGI.
        connections: beyond this many those are closed that have waited longest for a request of their client.
        settings: further ones of uvicorn.
    """
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        limit_concurrency=connections,
        log_level="warning",
        access_log=False,
        **settings,
    )


class Connection(H11Protocol):
    """A connection whose client must send the whole head of a request in time; uvicorn would wait for ever.

    At uvicorn's own limit of connections every request, that for /health too, is told 503. Here room is made instead:
    a client that asks is heard, however many are connected and say nothing.
    """

    header_seconds = 10.0
    """From the connection, or the last answer on it, to the end of the next request's headers."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._most_connections, self.limit_concurrency = self.limit_concurrency, None
        self._waiting: asyncio.TimerHandle | None = None

    @property
    def has_asked(self) -> bool:
        """Return whether a request has come whole and its answer has not gone out."""
        return self._is_answering and not self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait, and make room."""
        super().connection_made(transport)
        self._wait()
        if self._most_connections is not None and len(self.connections) > self._most_connections:
            self._make_room(self._most_connections)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._wait_no_more()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Read what has come; a request whose head is whole is waited for by who answers it."""
        super().handle_events()
        if self._is_answering:
            self._wait_no_more()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._wait()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(400, msg)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._wait_no_more()
        self._since = self.loop.time()
        self._waiting = self.loop.call_later(self.header_seconds, self._give_up)

    def _wait_no_more(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        has_begun = bool(self.conn.trailing_data[0]) and self.conn.our_state is h11.IDLE
        if self.transport.is_closing() or not has_begun:
            self.transport.abort()
            return
        self._refuse(408, f"the headers of a request did not arrive within {self.header_seconds:g} s")
        self._wait()  # for the client to take that

    def _refuse(self, status: int, message: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # an answer is on its way already
            return
        body = json.dumps(error_body(status, message)).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        reply = h11.Response(status_code=status, headers=list(headers.items()))
        for event in (reply, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _make_room(self, most: int) -> None:
        connected = [one for one in self.connections if isinstance(one, Connection) and not one.transport.is_closing()]
        silent = sorted((one for one in connected if one is not self and not one.has_asked), key=lambda one: one._since)
        for one in silent[: max(0, len(connected) - most)]:
            one.transport.abort()
