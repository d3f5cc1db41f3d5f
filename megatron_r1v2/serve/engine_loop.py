"""The engine's side of a server: one loop on every rank of the replica, told by rank 0 what to do before each step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_r1v2.generation.controller import DrawnToken
from megatron_r1v2.generation.engine import Request, RolloutEngine
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.generation.phase import GenerationPhase
from megatron_r1v2.parallel import objects

# How long rank 0 sleeps at most before it looks for a signal.
_NAP_SECONDS = 0.2
# Idle ranks are told so this often: they wait in a collective, which has a time limit.
HEARTBEAT_SECONDS = 20.0


@dataclass(frozen=True)
class Orders:
    """What happens before the next step of the engine."""

    new: tuple[Request, ...] = ()
    cancelled: tuple[int, ...] = ()
    """Request ids."""
    stop: bool = False
    """End the loop."""


class Inbox:
    """Where the web server's thread leaves orders for the engine's thread."""

    def __init__(self) -> None:
        """Make it empty."""
        self._changed = threading.Condition()
        self._new: list[Request] = []
        self._cancelled: list[int] = []
        self._stop = False

    def add(self, requests: Sequence[Request]) -> None:
        """Order responses."""
        with self._changed:
            self._new += requests
            self._changed.notify()

    def cancel(self, request_ids: Sequence[int]) -> None:
        """Order that requests end."""
        with self._changed:
            self._cancelled += request_ids
            self._changed.notify()

    def stop(self) -> None:
        """Order the end of the loop."""
        with self._changed:
            self._stop = True
            self._changed.notify()

    def take(self, *, wait_seconds: float, each_nap: Callable[[], None]) -> Orders:
        """Return all that was ordered.

        Args:
            wait_seconds: for the first order; 0: what is there.
            each_nap: called now and then while waiting.
        """
        deadline = time.monotonic() + wait_seconds
        with self._changed:
            while not (self._new or self._cancelled or self._stop) and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(min(left, _NAP_SECONDS))
                each_nap()
            orders = Orders(tuple(self._new), tuple(self._cancelled), self._stop)
            self._new, self._cancelled = [], []
        return orders


def lead(
    engine: RolloutEngine,
    inbox: Inbox,
    *,
    max_response_tokens: int,
    deliver: Callable[[list[DrawnToken]], None],
    each_turn: Callable[[], None],
    control: dist.ProcessGroup | None,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
) -> None:
    """Run the engine on rank 0 until the inbox says stop.

    Args:
        engine: of this rank.
        inbox: what is to be done.
        max_response_tokens: the longest response.
        deliver: takes the tokens of each step.
        each_turn: called before each step, and now and then while there is nothing to do.
        control: group of the replica's ranks; None for a rank alone.
        heartbeat_seconds: the longest that the other ranks hear nothing.
    """
    features = _no_cache()
    with engine.phase(max_response_tokens) as phase:
        while True:
            each_turn()
            orders = inbox.take(wait_seconds=0 if phase.num_in_flight else heartbeat_seconds, each_nap=each_turn)
            if control is not None:
                orders = objects.broadcast_from_first(orders, control)
            if orders.stop:
                return
            _obey(engine, phase, orders, features)
            if phase.num_in_flight:
                deliver(phase.step())


def follow(engine: RolloutEngine, *, max_response_tokens: int, control: dist.ProcessGroup) -> None:
    """Run the engine on another rank, step by step with rank 0, until that stops.

    Args:
        engine: of this rank.
        max_response_tokens: the longest response.
        control: group of the replica's ranks.
    """
    features = _no_cache()
    with engine.phase(max_response_tokens) as phase:
        while True:
            orders: Orders = objects.broadcast_from_first(None, control)
            if orders.stop:
                return
            _obey(engine, phase, orders, features)
            if phase.num_in_flight:
                phase.step()


def _no_cache() -> FeatureCache:
    """Return a cache that keeps nothing: the embeddings of an image live as long as the requests that look at it."""
    return FeatureCache(0)


def _obey(engine: RolloutEngine, phase: GenerationPhase, orders: Orders, features: FeatureCache) -> None:
    if orders.new:
        engine.add(phase, orders.new, features)
    for request_id in orders.cancelled:
        phase.cancel(request_id)
