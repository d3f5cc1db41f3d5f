"""The loop on every rank: commands in, tokens out, the same on a follower, and no silence beyond the heartbeat."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from megatron_r1v2.generation.tokens import DrawnToken
from megatron_r1v2.serve.engine_loop import Command, CommandQueue, run_follower, run_leader
from tests.ranks import run_ranks


class CountingEngine:
    """An engine that gives each request as many tokens as it asks for, one a step, and keeps its commands."""

    def __init__(self) -> None:
        self.told: list[tuple] = []
        self.left: dict[int, int] = {}

    @contextmanager
    def open_phase(self, max_response_tokens: int, features: Any):
        self.told.append(("phase", max_response_tokens))
        yield self
        self.told.append(("end",))

    @property
    def num_in_flight(self) -> int:
        return len(self.left)

    def add(self, phase: Any, requests: Any, features: Any) -> None:
        assert phase is self
        self.told.append(("add", tuple(request.request_id for request in requests)))
        self.left |= {request.request_id: request.max_response_tokens for request in requests}

    def cancel(self, request_id: int) -> None:
        self.told.append(("cancel", request_id))
        self.left.pop(request_id, None)

    def step(self) -> list[DrawnToken]:
        self.told.append(("step", tuple(sorted(self.left))))
        self.left = {name: left - 1 for name, left in self.left.items()}
        tokens = [DrawnToken(name, 5, 0.0, is_last=left == 0) for name, left in self.left.items()]
        self.left = {name: left for name, left in self.left.items() if left}
        return tokens


def request(request_id: int, tokens: int = 2) -> Any:
    return SimpleNamespace(request_id=request_id, max_response_tokens=tokens)


def test_a_queue_gives_all_wishes_as_one_command_and_waits_for_the_first():
    queue, naps = CommandQueue(), []
    assert queue.take(wait_seconds=0, each_nap=lambda: naps.append(1)) == Command()
    queue.put(new=[request(1)])
    queue.put(new=[request(2)], cancelled=[7])
    queue.put(cancelled=[8])
    command = queue.take(wait_seconds=60, each_nap=lambda: naps.append(1))
    assert ([one.request_id for one in command.new], command.cancelled, command.stop) == ([1, 2], (7, 8), False)
    assert not naps
    threading.Timer(0.5, lambda: queue.put(stop=True)).start()
    started = time.monotonic()
    assert queue.take(wait_seconds=60, each_nap=lambda: naps.append(1)) == Command(stop=True)
    assert time.monotonic() - started < 30
    assert naps, "a signal would not be seen"
    assert queue.take(wait_seconds=0, each_nap=lambda: None).stop, "an end cannot be taken back"


def test_a_leader_steps_while_there_is_work_and_delivers_the_tokens():
    engine, queue, delivered, turns = CountingEngine(), CommandQueue(), [], []
    queue.put(new=[request(1, 2), request(2, 9)])

    def deliver(tokens) -> None:
        delivered.append([(token.request_id, token.is_last) for token in tokens])
        if len(delivered) == 2:
            queue.put(new=[request(3, 1)], cancelled=[2])
        if len(delivered) == 3:
            queue.put(stop=True)

    run_leader(engine, queue, max_response_tokens=9, deliver=deliver, each_turn=lambda: turns.append(1), control=None)
    assert engine.told == [
        ("phase", 9), ("add", (1, 2)), ("step", (1, 2)), ("step", (1, 2)), ("add", (3,)), ("cancel", 2),
        ("step", (3,)), ("end",),
    ]  # fmt: skip
    assert delivered == [[(1, False), (2, False)], [(1, True), (2, False)], [(3, True)]]
    assert len(turns) >= 4


def lead_and_follow() -> list[tuple]:
    """Two requests, an idle time of many heartbeats, another request, the end; return what this rank's engine saw."""
    dist.init_process_group("gloo")
    engine = CountingEngine()
    if dist.get_rank() == 1:
        run_follower(engine, max_response_tokens=9, control=dist.group.WORLD)
        return engine.told
    queue, beats, started = CommandQueue(), [], time.monotonic()
    queue.put(new=[request(1, 2), request(2, 2)])

    def each_turn() -> None:
        beats.append(time.monotonic() - started)
        if len(beats) == 12:
            queue.put(new=[request(3, 1)])
        if len(beats) == 20:
            queue.put(stop=True)

    run_leader(
        engine, queue, max_response_tokens=9, deliver=lambda tokens: None, each_turn=each_turn,
        control=dist.group.WORLD, heartbeat_seconds=0.1,
    )  # fmt: skip
    return engine.told


def test_a_follower_does_what_the_leader_does():
    leader, follower = run_ranks(2, lead_and_follow)
    assert follower == leader
    assert leader == [
        ("phase", 9), ("add", (1, 2)), ("step", (1, 2)), ("step", (1, 2)), ("add", (3,)), ("step", (3,)), ("end",),
    ]  # fmt: skip
