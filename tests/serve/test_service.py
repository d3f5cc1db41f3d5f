"""Requests under way: bounded, delivered to whoever waits, ended when nobody does."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_r1v2.generation.tokens import DrawnToken
from megatron_r1v2.serve.engine_loop import Command, CommandQueue
from megatron_r1v2.serve.service import Service
from megatron_r1v2.serve.web import RequestError

PROMPT: Any = SimpleNamespace(token_ids=(1, 2, 3))


def service_of(capacity: int = 4) -> tuple[Service, CommandQueue]:
    queue = CommandQueue()
    return Service(queue, capacity=capacity, stop_ids=frozenset({9})), queue


def taken(queue: CommandQueue) -> Command:
    return queue.take(wait_seconds=0, each_nap=lambda: None)


def submit(service: Service, count: int = 1):
    draws: Any = [f"draw {choice}" for choice in range(count)]
    return service.submit(PROMPT, draws, 7)


def token(request_id: int, token_id: int = 5, *, is_last: bool = False) -> DrawnToken:
    return DrawnToken(request_id, token_id, 0.0, is_last=is_last)


async def collect(responses) -> list[tuple[int, int]]:
    return [(choice, token.token_id) async for choice, token in responses.tokens()]


def test_each_response_is_a_request_of_its_own():
    async def scenario() -> None:
        service, queue = service_of()
        submit(service)
        responses = submit(service, 2)
        new = taken(queue).new
        assert [one.request_id for one in new] == [0, 1, 2]
        assert [one.draw for one in new] == ["draw 0", "draw 0", "draw 1"]
        assert {one.max_response_tokens for one in new} == {7}
        assert (service.num_open, responses.open) == (3, {0: 1, 1: 2})
        assert service.counts["prompt_tokens_total"] == 6

    asyncio.run(scenario())


def test_tokens_reach_the_request_they_belong_to_until_its_responses_end():
    async def scenario() -> None:
        service, queue = service_of()
        one, two = submit(service), submit(service, 2)
        # As the engine's thread does.
        await asyncio.to_thread(service.deliver, [token(0, 50), token(1, 51), token(2, 52, is_last=True)])
        await asyncio.to_thread(service.deliver, [token(0, 60, is_last=True), token(1, 61, is_last=True)])
        assert await asyncio.wait_for(collect(two), 10) == [(0, 51), (1, 52), (0, 61)]
        assert await asyncio.wait_for(collect(one), 10) == [(0, 50), (0, 60)]
        assert service.num_open == 0
        assert service.counts["generated_tokens_total"] == 5
        one.close()
        assert taken(queue).cancelled == (), "it had ended"
        assert service.counts["abandoned_requests_total"] == 0

    asyncio.run(scenario())


def test_a_response_that_is_cut_is_cancelled_and_its_late_tokens_are_dropped():
    async def scenario() -> None:
        service, queue = service_of()
        responses = submit(service, 2)
        taken(queue)
        responses.cut(0)
        responses.cut(0)
        assert taken(queue).cancelled == (0,)
        service.deliver([token(0, 50), token(1, 51)])
        service.deliver([token(1, 61, is_last=True)])
        assert await asyncio.wait_for(collect(responses), 10) == [(1, 51), (1, 61)]
        assert service.counts["abandoned_requests_total"] == 0

    asyncio.run(scenario())


def test_a_request_that_nobody_waits_for_frees_its_places():
    async def scenario() -> None:
        service, queue = service_of(capacity=2)
        responses = submit(service, 2)
        with pytest.raises(RequestError, match=r"2 responses are under way or wait and 1 more .* takes 2") as caught:
            submit(service)
        assert caught.value.status == 503
        responses.close()
        responses.close()
        assert taken(queue).cancelled == (0, 1)
        assert (service.num_open, service.counts["abandoned_requests_total"]) == (0, 1)
        submit(service, 2)

    asyncio.run(scenario())


def test_the_end_is_told_to_everyone_who_waits_and_nothing_more_is_taken():
    async def scenario() -> None:
        service, _ = service_of()
        responses = [submit(service, 2), submit(service)]
        await asyncio.to_thread(service.give_up, "the engine broke")
        for one in responses:
            with pytest.raises(RequestError, match="the engine broke") as caught:
                await asyncio.wait_for(collect(one), 10)
            assert caught.value.status == 503
        assert service.num_open == 0
        with pytest.raises(RequestError, match="the engine broke"):
            submit(service)

    asyncio.run(scenario())


def test_a_reason_to_take_nothing_stays_and_an_end_without_requests_is_quiet():
    service, _ = service_of()
    service.closed_because = "about to end"
    service.give_up("another")
    service.deliver([])
    with pytest.raises(RequestError, match="about to end"):
        service.check_room(1)
