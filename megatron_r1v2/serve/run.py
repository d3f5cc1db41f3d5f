"""A chat server from start to end: the model on every rank, the web server and the signals on rank 0."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import uvicorn

from megatron_r1v2.config.schema import RunRecipe
from megatron_r1v2.generation.engine import RolloutEngine
from megatron_r1v2.parallel.groups import make_control_group
from megatron_r1v2.serve.chat_app import ChatModel, ChatServer
from megatron_r1v2.serve.chat_request import MAX_CHOICES, Defaults
from megatron_r1v2.serve.connections import web_config
from megatron_r1v2.serve.engine_loop import HEARTBEAT_SECONDS, Inbox, follow, lead
from megatron_r1v2.serve.metrics import ServerMetrics
from megatron_r1v2.serve.requests import Limits
from megatron_r1v2.serve.service import Service
from megatron_r1v2.stages.loaded_model import LoadedModel, open_model

_ENDING = "the server is about to end"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Answers are complete by then; this is for the last bytes on their way.
_FLUSH_SECONDS = 5


@dataclass(frozen=True)
class ServeOptions:
    """What is not a setting of the model or of generation."""

    name: str
    """Of the model, in requests and answers."""
    limits: Limits
    max_queue: int
    """Responses that may wait beside the `generation.max_requests` under way."""
    request_seconds: float
    grace_seconds: float
    """From SIGTERM until what is under way is ended with an error."""
    api_key: str = ""
    reasoning_ends: str = ""
    """Text between reasoning and answer, where they are told apart; empty: they are not."""


def serve(recipe: RunRecipe, options: ServeOptions, listener: socket.socket | None) -> None:
    """Load the model and serve it until the process is asked to end.

    Args:
        recipe: the settings.
        options: of the server.
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
            follow(engine, max_response_tokens=longest, control=control)
            return
        assert listener is not None
        inbox, metrics = Inbox(), ServerMetrics()
        capacity = recipe.generation.max_requests + options.max_queue
        service = Service(inbox, metrics, capacity=capacity, stop_ids=engine.stop_ids)
        model = chat_model(loaded, engine, options, max_choices=min(MAX_CHOICES, capacity))
        chat = ChatServer(
            model,
            service,
            metrics,
            limits=options.limits,
            api_key=options.api_key,
            request_seconds=options.request_seconds,
        )
        with _web_server(chat, listener, connections=2 * capacity + 64), Ending(service, inbox, options) as ending:
            try:
                lead(
                    engine,
                    inbox,
                    max_response_tokens=longest,
                    deliver=service.deliver,
                    each_turn=ending.look,
                    control=control,
                    heartbeat_seconds=min(HEARTBEAT_SECONDS, recipe.parallel.timeout_minutes * 60 / 4),
                )
            finally:
                # Whoever still waits is told, also when the engine has failed.
                service.give_up(_ENDING)


def chat_model(loaded: LoadedModel, engine: RolloutEngine, options: ServeOptions, *, max_choices: int) -> ChatModel:
    """Return what the endpoints know of a model."""
    recipe = loaded.recipe
    return ChatModel(
        defaults=Defaults(
            model=options.name,
            max_response_tokens=recipe.generation.max_response_tokens,
            temperature=recipe.generation.temperature,
            top_p=recipe.generation.top_p,
            max_choices=max_choices,
        ),
        builder=loaded.prompt_builder,
        check=engine.check,
        decode=loaded.tokenizer.decode,
        version=loaded.version,
        reasoning_ends=options.reasoning_ends,
    )


class Ending:
    """What SIGTERM and SIGINT do: no new requests; those under way may finish for a while, until a second signal."""

    def __init__(self, service: Service, inbox: Inbox, options: ServeOptions) -> None:
        """Prepare.

        Args:
            service: is closed.
            inbox: is told to stop.
            options: how long to wait.
        """
        self._service = service
        self._inbox = inbox
        self._grace_seconds = options.grace_seconds
        self._asked_at: list[float] = []

    def __enter__(self) -> Ending:
        self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def look(self) -> None:
        """Act on what was asked; called by the engine's thread, again and again."""
        if not self._asked_at:
            return
        self._service.closed_because = self._service.closed_because or _ENDING
        waited = time.monotonic() - self._asked_at[0]
        if not self._service.num_open or waited > self._grace_seconds or len(self._asked_at) > 1:
            self._inbox.stop()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._asked_at.append(time.monotonic())


@contextmanager
def _web_server(chat: ChatServer, listener: socket.socket, *, connections: int) -> Iterator[None]:
    """Run the web server in a thread of its own; signals stay with the main thread."""
    config = web_config(chat.app(), connections=connections, lifespan="on", timeout_graceful_shutdown=_FLUSH_SECONDS)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="web", daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the web server did not start; its message is above")
        time.sleep(0.02)
    address, port = listener.getsockname()[:2]
    print(f"serving {chat.model_name} on http://{address}:{port}/v1", flush=True)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(_FLUSH_SECONDS + 2)
