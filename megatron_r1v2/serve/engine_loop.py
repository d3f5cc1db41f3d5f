"""The engine's side of a server: one loop on every rank of the replica, led by rank 0's command before each step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_r1v2.generation.engine import Request, RolloutEngine
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.generation.phase import GenerationPhase
from megatron_r1v2.generation.tokens import DrawnToken
from megatron_r1v2.parallel import objects

# How long rank 0 sleeps at most before it looks for a signal.
_NAP_SECONDS = 0.2
# Idle ranks get an empty command this often: they wait in a collective, which has a time limit.
HEARTBEAT_SECONDS = 20.0


@dataclass(frozen=True)
class Command:
    """Requests to begin and to end before the next step of the engine."""

    new: tuple[Request, ...] = ()
    cancelled: tuple[int, ...] = ()
    """Request ids."""
    stop: bool = False
    """End the loop."""


class CommandQueue:
    """The requests of the web server's thread, until the engine's thread takes all of them as one command."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._new: list[Request] = []
        self._cancelled: list[int] = []
        self._stop = False

    def put(self, *, new: Sequence[Request] = (), cancelled: Sequence[int] = (), stop: bool = False) -> None:
        """Ask for responses, for the end of others (by request id), or for the end of the loop."""
        with self._changed:
            self._new += new
            self._cancelled += cancelled
            self._stop = self._stop or stop
            self._changed.notify()

    def take(self, *, wait_seconds: float, each_nap: Callable[[], None]) -> Command:
        """Return all that was asked for.

        Args:
            wait_seconds: for the first wish; 0: none is waited for.
            each_nap: called now and then while waiting.
        """
        deadline = time.monotonic() + wait_seconds
        with self._changed:
            while not (self._new or self._cancelled or self._stop) and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(min(left, _NAP_SECONDS))
                each_nap()
            command = Command(tuple(self._new), tuple(self._cancelled), self._stop)
            self._new, self._cancelled = [], []
        return command


def run_leader(
    engine: RolloutEngine,
    queue: CommandQueue,
    *,
    max_response_tokens: int,
    deliver: Callable[[list[DrawnToken]], None],
    each_turn: Callable[[], None],
    control: dist.ProcessGroup | None,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
) -> None:
    """Collective over `control`: run the engine on rank 0 until the queue says stop.

    Args:
        each_turn: called before each step, and now and then while there is nothing to do.
        control: group of the replica's ranks; None for a rank alone.
        heartbeat_seconds: the longest that the other ranks wait for a command.
    """

    def next_command(is_idle: bool) -> Command:
        """Collective over `control`: take the next command and give it to the other ranks."""
        each_turn()
        command = queue.take(wait_seconds=heartbeat_seconds if is_idle else 0, each_nap=each_turn)
        # Also the empty command: the other ranks wait in this collective.
        return command if control is None else objects.broadcast_from_first(command, control)

    _run(engine, max_response_tokens, next_command, deliver)


def run_follower(engine: RolloutEngine, *, max_response_tokens: int, control: dist.ProcessGroup) -> None:
    """Collective over `control`: run the engine on another rank, step by step with rank 0, until that stops."""
    _run(engine, max_response_tokens, lambda is_idle: objects.broadcast_from_first(None, control), lambda tokens: None)  # noqa: ARG005


def _run(
    engine: RolloutEngine,
    max_response_tokens: int,
    next_command: Callable[[bool], Command],
    deliver: Callable[[list[DrawnToken]], None],
) -> None:
    # A cache that keeps nothing: the embeddings of an image live as long as the requests that look at it.
    features = FeatureCache(0)
    with engine.open_phase(max_response_tokens, features) as phase:
        while not (command := next_command(not phase.num_in_flight)).stop:
            apply_command(engine, phase, command, features)
            if phase.num_in_flight:
                deliver(list(phase.step()))


def apply_command(engine: RolloutEngine, phase: GenerationPhase, command: Command, features: FeatureCache) -> None:
    """Collective over the replica: begin and cancel requests; all ranks encode the new images together."""
    if command.new:
        engine.add(phase, command.new, features)
    for request_id in command.cancelled:
        phase.cancel(request_id)
