"""A prompt is computed once for all responses to it, and nobody can tell from the tokens.

`CacheModel` takes the place of the network: it writes each token's id and position into the cache and checks that every
request finds exactly its own tokens there. So hypothesis can try many schedules on a tiny cache of the real engine.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.config.schema import GenerationConfig, ParallelConfig
from megatron_r1v2.generation import context as generation_context
from megatron_r1v2.generation.controller import Vocabulary
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.generation.phase import GenerationPhase
from megatron_r1v2.generation.sampling import Draw
from tests.generation.worlds import generate, make_engine, make_prompts, make_requests, phase_load, run, start
from tests.ranks import run_ranks

BLOCK = 4
BLOCK_BYTES = 2 * BLOCK * 2 * 24 * 4 * 2
"""2 layers x tokens x 2 key heads x 24 channels x 4 bytes, for keys and for values."""
LONGEST_PROMPT, LONGEST_RESPONSE = 18, 14


@dataclass(frozen=True)
class Group:
    """Responses to one prompt that arrive together."""

    arrival: int
    prompt_tokens: int
    lengths: tuple[int, ...]
    """Of the responses."""
    cancelled: tuple[int, ...]
    """Steps after the arrival before which a response is cancelled; -1: never."""


class CacheModel:
    """The network's work on the cache; the greedy token of a response depends on its name and its position."""

    def __init__(self, phase: GenerationPhase) -> None:
        self.phase, self.context = phase, phase._context
        self.tokens: dict[int, list[int]] = {}
        """Prompt and response so far, by request id."""
        self.prefilled = 0
        phase._controller._dynamic_step_forward_logits = self.forward

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        context = self.context
        count = context.active_token_count
        blocks, places = context.token_to_block_idx[:count], context.token_to_local_position_within_kv_block[:count]
        context.memory_buffer[:, :, blocks, places, :, 0] = input_ids[0, :count].float()[None, None, :, None]
        context.memory_buffer[:, :, blocks, places, :, 1] = position_ids[0, :count].float()[None, None, :, None]
        rows = range(context.paused_request_count, context.total_request_count)
        return torch.stack([self.check(row) for row in rows]).unsqueeze(0)

    def check(self, row: int) -> torch.Tensor:
        """Compare what a request sees with its tokens; return the logits of its next one."""
        context = self.context
        request = int(context.request_ids[row])
        length = int(context.request_kv_length_offsets[row] + context.request_query_lengths[row])
        tokens = self.tokens[request]
        if request == context.chunked_prefill_request_id:
            # Its last token stands for nothing where the next chunk found no room.
            length = self.phase._engine.get_request(request).finished_chunk_token_count
        else:
            assert length == len(tokens)
        positions = torch.arange(length)
        blocks = context.request_to_kv_block_ids[row, positions // BLOCK]
        assert (blocks >= 0).all()
        seen = context.memory_buffer[:, :, blocks, positions % BLOCK]
        assert (seen[..., 0] == torch.tensor(tokens[:length])[None, None, :, None]).all(), f"request {request}"
        assert (seen[..., 1] == positions[None, None, :, None]).all(), f"request {request}"
        return torch.nn.functional.one_hot(torch.tensor(next_token(request, len(tokens))), 300).float()

    def check_blocks(self) -> None:
        """Compare the references with the block tables, and the free blocks with what is left."""
        allocator, context = self.phase._engine._allocator, self.context
        table = context.request_to_kv_block_ids[: context.total_request_count]
        owners = Counter(table[table >= 0].tolist())
        blocks = range(allocator.total_count - 1)
        assert [allocator._references[block] for block in blocks] == [owners[block] for block in blocks]
        assert len(set(allocator._free)) == len(allocator._free)
        kept = [block for prompt in allocator._prompts.values() for block in prompt]
        assert sorted(kept) == sorted(allocator._kept)
        assert set(allocator._free) == {block for block in blocks if not owners[block] and block not in kept}
        assert allocator.total_avail == sum(not owners[block] for block in blocks)
        counts = context.request_kv_block_counts[: context.total_request_count]
        assert counts.tolist() == (table >= 0).sum(dim=1).tolist()


def next_token(request: int, position: int) -> int:
    return (request * 31 + position * 7) % 90


def play(phase: GenerationPhase, groups: list[Group]) -> dict[int, list[int]]:
    """Run a schedule to its end and return the tokens of each response."""
    model, results, longest = CacheModel(phase), {}, {}
    step = 0
    while step <= max(group.arrival for group in groups) or phase.num_in_flight:
        for number, group in enumerate(groups):
            for sample, length in enumerate(group.lengths):
                request = number * 10 + sample
                if step == group.arrival:
                    prompt = [(number * 13 + place * 5) % 100 for place in range(group.prompt_tokens)]
                    model.tokens[request], results[request], longest[request] = list(prompt), [], length
                    phase.add(
                        request,
                        prompt,
                        draw=Draw(request, 0.0),
                        images=None,
                        max_response_tokens=length,
                        prompt_key=str(number),
                    )
                if group.cancelled[sample] >= 0 and step == group.arrival + group.cancelled[sample]:
                    phase.cancel(request)
        for token in phase.step():
            results[token.request_id].append(token.token_id)
            model.tokens[token.request_id].append(token.token_id)
        model.check_blocks()
        step += 1
        assert step < 2000, "the schedule ends"
    assert phase._engine._allocator.total_avail == phase._engine._allocator.total_count - 1
    assert not phase._engine._allocator._kept
    return results


@st.composite
def groups_of_responses(draw) -> list[Group]:
    def group() -> Group:
        count = draw(st.sampled_from([4, 3, 2, 1]))
        return Group(
            arrival=draw(st.integers(0, 8)),
            prompt_tokens=draw(st.integers(1, LONGEST_PROMPT)),
            lengths=tuple(draw(st.sampled_from([LONGEST_RESPONSE, 9, 5, 2, 1])) for _ in range(count)),
            cancelled=tuple(draw(st.sampled_from([-1, -1, -1, -1, 0, 1, 3, 9])) for _ in range(count)),
        )

    return [group() for _ in range(draw(st.sampled_from([2, 3, 4, 1])))]


def open_phase(one_rank, *, blocks: int, max_requests: int, max_tokens: int) -> GenerationPhase:
    model, parallel = one_rank
    config = GenerationConfig(
        kv_cache_gib=(blocks + 0.5) * BLOCK_BYTES / 1024**3,
        max_requests=max_requests,
        max_tokens_per_step=max_tokens,
    )
    return GenerationPhase(
        model,
        parallel=parallel,
        settings=config,
        vocabulary=Vocabulary(100, frozenset()),
        load=phase_load(model, parallel, config),
        max_sequence_tokens=LONGEST_PROMPT + LONGEST_RESPONSE,
    )


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(generation_context, "_BLOCK_TOKENS_TORCH", BLOCK)


@pytest.mark.usefixtures("small_blocks")
def test_every_request_sees_its_own_tokens_in_any_schedule(one_rank):
    evictions: list[int] = []
    shared: list[int] = []

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(
        groups_of_responses(),
        st.integers(9, 20),
        st.sampled_from([8, 5, 2, 1]),
        st.sampled_from([0, 1, 4, 9, 24]),
    )
    def check(groups: list[Group], blocks: int, max_requests: int, spare_tokens: int) -> None:
        with torch.no_grad():
            phase = open_phase(
                one_rank, blocks=blocks, max_requests=max_requests, max_tokens=max_requests + spare_tokens
            )
            results = play(phase, groups)
        for number, group in enumerate(groups):
            for sample, length in enumerate(group.lengths):
                request = number * 10 + sample
                expected = [next_token(request, group.prompt_tokens + place) for place in range(length)]
                got = results[request]
                assert got == expected if group.cancelled[sample] < 0 else got == expected[: len(got)]
        evictions.append(phase.num_evictions)
        shared.append(phase.prefill_tokens[1] - phase.prefill_tokens[0])
        phase.close()

    check()
    assert sum(evictions) > 10, "the caches are tight"
    assert sum(shared) > 500


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("prompt_tokens", [1, 2, 4, 5, 8, 17])
def test_a_prompt_is_computed_once_and_its_last_token_by_each(one_rank, prompt_tokens):
    group = Group(0, prompt_tokens, (14, 6, 14, 1), (-1,) * 4)
    with torch.no_grad():
        phase = open_phase(one_rank, blocks=60, max_requests=8, max_tokens=64)
        play(phase, [group])
    assert phase.prefill_tokens == (prompt_tokens + 3, 4 * prompt_tokens)
    phase.close()


@pytest.mark.usefixtures("small_blocks")
def test_shared_blocks_leave_room_for_more_responses(one_rank):
    """Four responses of 2 tokens to 17: with a prompt each they need 20 blocks, with a shared one 8."""
    group = Group(0, 17, (2,) * 4, (-1,) * 4)
    with torch.no_grad():
        phase = open_phase(one_rank, blocks=9 + 1, max_requests=8, max_tokens=64)
        model, steps = CacheModel(phase), []
        play_steps = phase.step
        phase.step = lambda: steps.append(phase._context.total_request_count) or play_steps()
        play(phase, [group])
    assert model is not None
    assert len(steps) <= 4, "the leader, then the three others together"
    assert phase.num_evictions == 0
    phase.close()


def unshared(requests):
    """Give each request a prompt of its own name, so that nothing is shared."""
    return [
        replace(request, prompt=replace(request.prompt, key=f"{request.prompt.key} {request.request_id}"))
        for request in requests
    ]


def siblings(model, *, responses: int = 4, tokens: int = 40):
    """Return requests of which each four look at one prompt, images included."""
    prompts = make_prompts(model, 3)
    return [
        replace(request, prompt=prompts[number // responses])
        for number, request in enumerate(make_requests(model, 3 * responses, tokens=tokens))
    ]


LONGEST = 60
"""Tokens of a response: enough that little memory is too little."""
ENGINES = {
    "roomy": {},
    "few at a time": {"max_requests": 3},
    "chunks": {"max_requests": 8, "max_tokens_per_step": 24},
    "little memory": {"kv_cache_gib": 0.0004},
    "chunks and little memory": {"kv_cache_gib": 0.00034, "max_requests": 6, "max_tokens_per_step": 30},
}


def assert_same(results, expected) -> None:
    assert results.keys() == expected.keys()
    for request, tokens in expected.items():
        assert [token.token_id for token in results[request]] == [token.token_id for token in tokens], request
        for token, other in zip(results[request], tokens, strict=True):
            assert token.log_prob == pytest.approx(other.log_prob, abs=2e-5)


def results_of(model, context, names=tuple(ENGINES)) -> dict:
    """Generate with and without sharing, in several engines."""
    results = {}
    for name in names:
        engine_settings = ENGINES[name]
        requests = siblings(model, tokens=LONGEST)
        arrivals = {0: requests[:5], 2: requests[5:]}
        cancel = {1: [requests[1].request_id], 6: [requests[8].request_id]}
        engine = make_engine(model, context, **engine_settings)
        # Each rank holds a part of each token's keys and values.
        gib = engine.settings.kv_cache_gib / (context.tensor_size * context.pipeline_size)
        engine.settings = engine.settings.changed(kv_cache_gib=gib)
        engine.stop_ids = frozenset({100})
        shared = run(engine, arrivals, cancel=cancel, longest=LONGEST)
        counts = engine.prefill_tokens, engine.num_evictions
        own = run(engine, {step: unshared(each) for step, each in arrivals.items()}, cancel=cancel, longest=LONGEST)
        results[name] = (shared, own, *counts, engine.prefill_tokens, engine.num_evictions)
    return results


def check_results(results: dict) -> None:
    for name, (shared, own, (computed, separate), evictions, own_tokens, own_evictions) in results.items():
        # A cancelled one may come a step further with or without sharing.
        ended = {request for request, tokens in shared.items() if tokens[-1].is_last}
        assert len(ended) >= 10
        assert_same({request: shared[request] for request in ended}, {request: own[request] for request in ended})
        assert computed < separate, name
        assert evictions > 0 or "memory" not in name
        # An evicted request finds its own prompt again.
        assert own_evictions > 0 or own_tokens[0] == own_tokens[1], f"{name}: the reference shares nothing"


@pytest.fixture(scope="module")
def results_of_one_rank(one_rank) -> dict:
    return results_of(*one_rank)


def test_tokens_are_those_without_sharing(results_of_one_rank):
    check_results(results_of_one_rank)


ON_TWO_RANKS = ("roomy", "chunks and little memory")


def two_ranks(folder: str) -> dict:
    layouts = {"TP2": ParallelConfig(tensor=2), "PP2": ParallelConfig(pipeline=2)}
    return {name: results_of(*start(folder, parallel), ON_TWO_RANKS) for name, parallel in layouts.items()}


def test_tokens_are_those_without_sharing_on_two_ranks(model_folder, results_of_one_rank):
    for rank in run_ranks(2, two_ranks, model_folder):
        for results in rank.values():
            check_results(results)
            assert_same(results["roomy"][0], results_of_one_rank["roomy"][0])


def test_groups_of_a_rollout_count_what_they_save(one_rank):
    model, context = one_rank
    engine = make_engine(model, context)
    prompts = make_prompts(model, 3)
    generate(engine, prompts, FeatureCache(10**9), num_responses=4)
    tokens = [len(prompt.token_ids) for prompt in prompts]
    assert engine.prefill_tokens == (sum(tokens) + 3 * 3, 4 * sum(tokens))


def test_prompts_of_one_name_with_other_tokens_are_apart(one_rank):
    """A prompt may end with the beginning of a response."""
    model, context = one_rank
    first, second = make_requests(model, 2)
    longer = replace(first.prompt, token_ids=(*first.prompt.token_ids, 7))
    second = replace(second, prompt=longer)
    engine = make_engine(model, context)
    together = run(engine, {0: [first, second]})
    assert engine.prefill_tokens[0] == engine.prefill_tokens[1]
    assert_same(together, run(engine, {0: [first]}) | run(engine, {0: [second]}))
