"""A chat server from start to end: the model on every rank, the web server and the signals on rank 0."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from megatron_r1v2.config.recipes import ServeRecipe
from megatron_r1v2.parallel.groups import make_control_group
from megatron_r1v2.serve.chat_server import ChatServer
from megatron_r1v2.serve.engine_loop import HEARTBEAT_SECONDS, CommandQueue, run_follower, run_leader
from megatron_r1v2.serve.options import ChatOptions
from megatron_r1v2.serve.service import Service
from megatron_r1v2.serve.web import uvicorn_config
from megatron_r1v2.stages.loaded_model import open_model

_ENDING = "the server is about to end"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Answers are complete by then; this is for the last bytes on their way.
_FLUSH_SECONDS = 5
# Beside those with a response under way: /health and /metrics must be answered when all places are taken.
_SPARE_CONNECTIONS = 512


def serve(recipe: ServeRecipe, options: ChatOptions, key: str, listener: socket.socket | None) -> None:
    """Collective over all ranks: load the model and serve it until the process is asked to end.

    Args:
        key: that clients must send; empty: none.
        listener: bound, on rank 0; None on the others.
    """
    with open_model(recipe) as loaded:
        control = make_control_group(recipe.parallel)
        engine = loaded.engine()
        longest = recipe.generation.max_response_tokens
        if not loaded.context.is_main:
            for number in _SIGNALS:
                # torchrun passes them to all ranks; these end when rank 0 says so.
                signal.signal(number, signal.SIG_IGN)
            assert control is not None
            run_follower(engine, max_response_tokens=longest, control=control)
            return
        assert listener is not None
        queue = CommandQueue()
        capacity = recipe.generation.max_requests + options.max_queue
        service = Service(queue, capacity=capacity, stop_ids=engine.stop_ids)
        chat = ChatServer(loaded, engine, service, options, key)
        ending = Ending(service, queue, options.grace_seconds)
        with run_in_thread(chat.app(), listener, connections=capacity + _SPARE_CONNECTIONS):
            address, port = listener.getsockname()[:2]
            print(f"serving {options.name} on http://{address}:{port}/v1", flush=True)
            try:
                run_leader(
                    engine,
                    queue,
                    max_response_tokens=longest,
                    deliver=service.deliver,
                    each_turn=ending.act,
                    control=control,
                    heartbeat_seconds=min(HEARTBEAT_SECONDS, recipe.parallel.timeout_minutes * 60 / 4),
                )
            finally:
                # Clients that still wait are answered, also when the engine has failed.
                service.give_up(_ENDING)


class Ending:
    """The end by SIGTERM or SIGINT: no new requests; those under way may finish for a while, until a second signal.

    Args:
        grace_seconds: from the signal until what is under way is ended.
    """

    def __init__(self, service: Service, queue: CommandQueue, grace_seconds: float) -> None:
        self._service = service
        self._queue = queue
        self._grace_seconds = grace_seconds
        self._asked_at: list[float] = []
        for number in _SIGNALS:
            signal.signal(number, self._receive)

    def act(self) -> None:
        """Act on the signals that came; called by the engine's thread, again and again."""
        if not self._asked_at:
            return
        self._service.closed_because = self._service.closed_because or _ENDING
        waited = time.monotonic() - self._asked_at[0]
        if not self._service.num_open or waited > self._grace_seconds or len(self._asked_at) > 1:
            self._queue.put(stop=True)

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._asked_at.append(time.monotonic())


@contextmanager
def run_in_thread(app: Starlette, listener: socket.socket, *, connections: int) -> Iterator[None]:
    """Run a web server in a thread of its own; signals stay with the main thread."""
    server = uvicorn.Server(uvicorn_config(app, connections=connections, graceful_seconds=_FLUSH_SECONDS))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="web", daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the web server did not start; its message is above")
        time.sleep(0.02)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(_FLUSH_SECONDS + 2)
