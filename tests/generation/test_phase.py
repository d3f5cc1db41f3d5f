"""Requests that come and go while others decode: each gets the tokens that it would get alone."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from megatron_r1v2.generation.features import FeatureCache
from tests.generation.worlds import generate, make_engine, make_prompts, make_requests, run


def assert_same(results, expected):
    assert results.keys() == expected.keys()
    for request_id, tokens in expected.items():
        assert [token.token_id for token in results[request_id]] == [token.token_id for token in tokens]
        assert [token.is_last for token in results[request_id]] == [False] * (len(tokens) - 1) + [True]
        for token, other in zip(results[request_id], tokens, strict=True):
            assert token.log_prob == pytest.approx(other.log_prob, abs=2e-5)
            assert [alternative for alternative, _ in token.alternatives] == [
                alternative for alternative, _ in other.alternatives
            ]


@pytest.fixture(scope="module")
def alone(one_rank) -> dict[int, list]:
    """Return the tokens of each request when nothing else is there."""
    model, context = one_rank
    engine = make_engine(model, context)
    results = {}
    for request in make_requests(model, 8):
        results |= run(engine, {0: [request]})
    return results


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
    results = run(make_engine(model, context, **settings), {0: requests}, cancel={step: gone})
    assert_same(
        {request: tokens for request, tokens in results.items() if request not in gone},
        {request.request_id: alone[request.request_id] for request in requests if request.request_id not in gone},
    )
    for request_id in gone:
        assert len(results.get(request_id, [])) <= step
        assert not any(token.is_last for token in results.get(request_id, [])) or len(alone[request_id]) <= step


def test_a_cancelled_request_makes_room_at_once(one_rank):
    model, context = one_rank
    engine = make_engine(model, context, max_requests=2)
    engine.stop_ids = frozenset({100})
    first, second, third = make_requests(model, 3, tokens=40)
    results = run(engine, {0: [first, second], 1: [third]}, cancel={5: [first.request_id]}, longest=40)
    assert len(results[first.request_id]) == 5
    assert results[third.request_id][-1].is_last
    with engine.open_phase(40, FeatureCache(0)) as phase:
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
    results = run(tight, {0: requests}, cancel=gone, longest=150)
    assert tight.num_evictions > 0
    assert_same({request.request_id: results[request.request_id] for request in kept}, expected)


def test_an_idle_phase_can_be_asked_again(one_rank, alone):
    """A server's phase lives as long as the server."""
    model, context = one_rank
    engine = make_engine(model, context)
    with engine.open_phase(24, FeatureCache(0)) as phase:
        assert list(phase.step()) == []
        for _ in range(2):
            for request in make_requests(model, 3):
                engine.add(phase, [request], FeatureCache(0))
                tokens = []
                while phase.num_in_flight:
                    tokens += phase.step()
                assert [t.token_id for t in tokens] == [t.token_id for t in alone[request.request_id]]
                assert list(phase.step()) == []


def test_cache_memory_is_given_back(one_rank):
    model, context = one_rank
    engine = make_engine(model, context, max_requests=64, kv_cache_gib=1.0)

    def live_bytes() -> int:
        storages = {}
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor) and type(thing) is torch.Tensor and thing.device.type == "cpu":
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        return sum(storages.values())

    gc.collect()
    before, during = live_bytes(), []
    gc.disable()  # the cache must not wait for the garbage collector
    try:
        generate(
            engine, make_prompts(model, 2), FeatureCache(0), progress=lambda *_: during or during.append(live_bytes())
        )
        after = live_bytes()
    finally:
        gc.enable()
    # 64 requests x 2 blocks x 64 tokens x 2 layers x (keys, values) x 2 heads x 24 channels x 4 bytes
    assert during[0] - before > 64 * 2 * 64 * 2 * 2 * 2 * 24 * 4
    assert after - before < 200_000


def test_the_memory_of_the_cache_goes_back_to_the_device(one_rank, monkeypatch):
    """Only then: what torch's allocator keeps, tensors that outlive the phase would settle in."""
    model, context = one_rank
    given_back = []
    with make_engine(model, context).open_phase(8, FeatureCache(0)) as phase:
        cache = weakref.ref(phase._context.memory_buffer.untyped_storage())
        assert cache() is not None
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(cache() is None))
    assert given_back == [True]
