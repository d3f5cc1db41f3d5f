"""The loop on every rank: commands in, tokens out, the same on a follower, and no silence beyond the heartbeat."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_r1v2.generation import context as generation_context
from megatron_r1v2.generation.engine import RolloutEngine
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.generation.phase import GenerationPhase
from megatron_r1v2.generation.sampling import Draw
from megatron_r1v2.generation.tokens import DrawnToken
from megatron_r1v2.serve.engine_loop import Command, CommandQueue, apply_command, run_follower, run_leader
from megatron_r1v2.serve.service import Service
from megatron_r1v2.types import Prompt
from tests.generation.worlds import make_engine, make_prompts
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


BLOCK_GIB = 4 * 2 * 24 * 4 * 2 * 2 / 1024**3
"""Of 4 tokens: 2 key heads x 24 channels x 4 bytes, keys and values of 2 layers."""


@dataclass
class Asked:
    """Clients of a server in this process, whose engine steps when it is told to."""

    engine: RolloutEngine
    phase: GenerationPhase
    queue: CommandQueue
    service: Service

    def step(self) -> list[DrawnToken]:
        """Do what the loop does before a step, and the step."""
        apply_command(self.engine, self.phase, self.queue.take(wait_seconds=0, each_nap=bool), FeatureCache(0))
        tokens = list(self.phase.step())
        self.service._hand_out(tokens)
        return tokens


@contextmanager
def server_of(one_rank, *, blocks: int) -> Iterator[Asked]:
    model, context = one_rank
    engine = make_engine(model, context, max_requests=8, max_tokens_per_step=512, kv_cache_gib=blocks * BLOCK_GIB)
    engine.stop_ids = frozenset()
    queue = CommandQueue()
    with engine.open_phase(20, FeatureCache(0)) as phase:
        yield Asked(engine, phase, queue, Service(queue, capacity=64, stop_ids=frozenset()))


def free_blocks(phase: GenerationPhase) -> int:
    free: int = phase._context.block_allocator.total_avail
    return free


async def ask(asked: Asked, prompts: list[Prompt]) -> tuple[int, dict[tuple[int, int], list[int]]]:
    """Ask for 8 responses in all; return how many were in flight at once at most, and the tokens of each."""
    num_choices = 8 // len(prompts)
    draws = [
        [Draw(number * num_choices + choice, 1.0) for choice in range(num_choices)] for number in range(len(prompts))
    ]
    requests = [asked.service.submit(prompt, each, 6) for prompt, each in zip(prompts, draws, strict=True)]
    most = 0
    while asked.service.num_open:
        asked.step()
        most = max(most, asked.phase._context.total_request_count)
    tokens: dict[tuple[int, int], list[int]] = {}
    for number, request in enumerate(requests):
        async for choice, token in request.tokens():
            tokens.setdefault((number, choice), []).append(token.token_id)
    return most, tokens


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(generation_context, "_BLOCK_TOKENS_TORCH", 4)


@pytest.mark.usefixtures("small_blocks")
def test_choices_of_a_request_share_its_prompt_so_more_are_in_flight(one_rank):
    """A prompt takes 10 blocks and a response 2 or 3 of its own: 35 blocks hold all eight of one prompt, or two."""
    prompt = make_prompts(one_rank[0], 1)[0]
    assert 36 < len(prompt.token_ids) <= 40
    with server_of(one_rank, blocks=36) as asked:
        together, shared = asyncio.run(ask(asked, [prompt]))
        assert free_blocks(asked.phase) == 35
    with server_of(one_rank, blocks=36) as asked:
        apart, own = asyncio.run(ask(asked, [replace(prompt, key=f"{prompt.key} {number}") for number in range(8)]))
    assert list(shared.values()) == list(own.values()), "nobody can tell from the tokens"
    assert together == 8
    assert apart <= 3


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_a_request_that_nobody_waits_for_gives_its_blocks_back(one_rank, steps):
    """Also those of the prompt, however many choices share them."""
    prompt, other = make_prompts(one_rank[0], 2)

    async def scenario() -> None:
        with server_of(one_rank, blocks=60) as asked:
            all_free = free_blocks(asked.phase)
            asked.service.submit(other, [Draw(9, 1.0)], 20)
            asked.step()
            before = free_blocks(asked.phase)
            gone = asked.service.submit(prompt, [Draw(choice, 1.0) for choice in range(4)], 20)
            for _ in range(steps):
                asked.step()
            if steps > 1:
                assert before - free_blocks(asked.phase) < 4 * 10, "the prompt is there once"
            gone.close()
            asked.step()
            asked.step()
            assert asked.phase.num_in_flight == 1, "the other goes on"
            assert free_blocks(asked.phase) >= before - 2, "which took one or two more"
            while asked.service.num_open:
                asked.step()
            assert free_blocks(asked.phase) == all_free

    asyncio.run(scenario())
