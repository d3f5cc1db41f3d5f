"""Requests that come and go while others decode: each gets the tokens that it would get alone."""

from __future__ import annotations

import pytest

from megatron_r1v2.generation.engine import Request
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.generation.sampling import Draw
from tests.generation.worlds import VOCABULARY, make_engine, make_prompts

SAMPLING = [(0.0, 1.0), (1.0, 1.0), (0.7, 0.8), (1.0, 1e-6)]


def make_requests(model, count: int, *, tokens: int = 24) -> list[Request]:
    """Return requests that are all drawn differently; every second one wants alternatives."""
    return [
        Request(
            request_id=100 + number,
            prompt=prompt,
            draw=Draw(number * 7919, *SAMPLING[number % len(SAMPLING)], num_alternatives=3 * (number % 2)),
            max_response_tokens=tokens - number % 3,
        )
        for number, prompt in enumerate(make_prompts(model, count))
    ]


def run(engine, arrivals, *, cancel=None, longest=24) -> dict[int, list]:
    """Add requests before the steps they are listed under and collect the tokens of each.

    Args:
        arrivals: by step.
        cancel: request ids by step.
    """
    found: dict[int, list] = {}
    with engine.phase(longest) as phase:
        step = 0
        while step <= max(arrivals) or phase.num_in_flight:
            engine.add(phase, arrivals.get(step, []), FeatureCache(0))
            for request_id in (cancel or {}).get(step, []):
                phase.cancel(request_id)
            for token in phase.step() if phase.num_in_flight else []:
                found.setdefault(token.request_id, []).append(token)
            step += 1
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for request_id, tokens in expected.items():
        assert [token.token_id for token in found[request_id]] == [token.token_id for token in tokens]
        assert [token.is_last for token in found[request_id]] == [False] * (len(tokens) - 1) + [True]
        for token, other in zip(found[request_id], tokens, strict=True):
            assert token.log_prob == pytest.approx(other.log_prob, abs=2e-5)
            assert [alternative for alternative, _ in token.alternatives] == [
                alternative for alternative, _ in other.alternatives
            ]


@pytest.fixture(scope="module")
def alone(one_rank) -> dict[int, list]:
    """Return the tokens of each request when nothing else is there."""
    model, context = one_rank
    engine = make_engine(model, context)
    found = {}
    for request in make_requests(model, 8):
        found |= run(engine, {0: [request]})
    return found


def test_alternatives_are_the_most_probable_tokens(one_rank, alone):
    model, _ = one_rank
    for request in make_requests(model, 8):
        for token in alone[request.request_id]:
            assert len(token.alternatives) == request.draw.num_alternatives
            values = [log_prob for _, log_prob in token.alternatives]
            assert values == sorted(values, reverse=True)
            if values:
                assert token.log_prob <= values[0]
                told = dict(token.alternatives)
                assert told.get(token.token_id, token.log_prob) == token.log_prob
                assert max(told) < VOCABULARY
            if values and request.draw.top_p < 0.1:
                assert token.token_id == token.alternatives[0][0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_requests": 3},
        {"max_requests": 8, "max_tokens_per_step": 24},
        {"max_requests": 4, "kv_cache_gib": 6e-4},
    ],
    ids=["roomy", "few at a time", "chunked prefill", "little memory"],
)
def test_late_comers_join_without_disturbing_anyone(one_rank, alone, settings):
    model, context = one_rank
    requests = make_requests(model, 8)
    arrivals = {0: requests[:2], 3: requests[2:5], 4: requests[5:6], 19: requests[6:]}
    assert_same(run(make_engine(model, context, **settings), arrivals), alone)


@pytest.mark.parametrize(
    ("settings", "step"),
    [({}, 4), ({}, 0), ({"max_requests": 2}, 2), ({"max_requests": 8, "max_tokens_per_step": 24}, 1)],
    ids=["decoding", "before its first step", "waiting", "between two chunks"],
)
def test_cancelled_requests_leave_and_the_others_do_not_notice(one_rank, alone, settings, step):
    model, context = one_rank
    requests = make_requests(model, 6)
    gone = [requests[index].request_id for index in (0, 1, 3, 5)]
    found = run(make_engine(model, context, **settings), {0: requests}, cancel={step: gone})
    assert_same(
        {request: tokens for request, tokens in found.items() if request not in gone},
        {request.request_id: alone[request.request_id] for request in requests if request.request_id not in gone},
    )
    for request_id in gone:
        assert len(found.get(request_id, [])) <= step
        assert not any(token.is_last for token in found.get(request_id, [])) or len(alone[request_id]) <= step


def test_a_cancelled_request_makes_room_at_once(one_rank):
    model, context = one_rank
    engine = make_engine(model, context, max_requests=2)
    engine.stop_ids = frozenset({100})
    first, second, third = make_requests(model, 3, tokens=40)
    found = run(engine, {0: [first, second], 1: [third]}, cancel={5: [first.request_id]}, longest=40)
    assert len(found[first.request_id]) == 5
    assert found[third.request_id][-1].is_last
    with engine.phase(40) as phase:
        engine.add(phase, [first, second, third], FeatureCache(0))
        for _ in range(5):
            phase.step()
        phase.cancel(first.request_id)
        phase.cancel(first.request_id)
        phase.cancel(4711)
        phase.step()
        assert phase.num_in_flight == 2
        assert third.request_id in {token.request_id for token in phase.step()}


def test_cancelling_goes_with_evictions(one_rank):
    model, context = one_rank
    tight = make_engine(model, context, kv_cache_gib=0.001)
    tight.stop_ids = frozenset({100})
    requests = make_requests(model, 24, tokens=150)
    kept = requests[:3]
    roomy = make_engine(model, context)
    roomy.stop_ids = tight.stop_ids
    expected = run(roomy, {0: kept}, longest=150)
    gone = {step: [requests[3 + step // 6].request_id] for step in range(0, 126, 6)}
    found = run(tight, {0: requests}, cancel=gone, longest=150)
    assert tight.num_evictions > 0
    assert_same({request.request_id: found[request.request_id] for request in kept}, expected)


def test_an_idle_phase_can_be_asked_again(one_rank, alone):
    """A server's phase lives as long as the server."""
    model, context = one_rank
    engine = make_engine(model, context)
    with engine.phase(24) as phase:
        assert phase.step() == []
        for _ in range(2):
            for request in make_requests(model, 3):
                engine.add(phase, [request], FeatureCache(0))
                tokens = []
                while phase.num_in_flight:
                    tokens += phase.step()
                assert [t.token_id for t in tokens] == [t.token_id for t in alone[request.request_id]]
                assert phase.step() == []
