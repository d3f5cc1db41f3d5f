"""The size of the cache: a number, or what is free less what a phase takes; the same on all ranks of a replica."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_r1v2.config.schema import GenerationConfig, ParallelConfig
from megatron_r1v2.generation import cache_size
from megatron_r1v2.generation.cache_size import (
    GIB,
    CacheShape,
    Room,
    agree_on_blocks,
    count_given_blocks,
    measure_room,
    working_bytes,
)
from megatron_r1v2.generation.context import make_context
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.generation.queue import SharedPromptQueue
from tests.generation.worlds import generate, make_engine, make_prompts, phase_load, start
from tests.ranks import run_ranks

SHAPE = CacheShape(block_tokens=64, block_bytes=1000, sequence_tokens=130, max_requests=5)


def test_a_cache_has_at_most_the_blocks_of_all_requests_and_one():
    assert SHAPE.sequence_blocks == 3
    assert SHAPE.least_bytes == 4000
    assert [SHAPE.count_blocks(size) for size in (999, 4999, 15_999, 16_000, 10**9)] == [0, 4, 15, 16, 16]


def test_a_given_size_is_taken_at_its_word():
    assert count_given_blocks(GenerationConfig(kv_cache_gib=5500 / GIB), SHAPE) == 5
    with pytest.raises(ValueError, match="holds 2 blocks of 64 tokens, but one sequence of 130 tokens"):
        count_given_blocks(GenerationConfig(kv_cache_gib=3999 / GIB), SHAPE)


def test_what_is_free_is_asked_after_the_allocator_has_given_back_its_own(one_rank, monkeypatch):
    model, parallel = one_rank
    load = phase_load(model, parallel, GenerationConfig())
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: calls.append(device.type) or (50_000, 100_000))
    room = measure_room(model.architecture, load, torch.device("cuda"), flash=True)
    assert room == Room(47_000, working_bytes(model.architecture, load))
    assert calls == ["empty", "cuda"]
    copies = measure_room(model.architecture, load, torch.device("cuda"), flash=False)
    assert copies.free == 23_500, "attention copies the cache"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for gpus, free in ((1, 11_750), (2, 23_500), (3, 23_500), (4, 47_000), (8, 47_000)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        shared = measure_room(model.architecture, load, torch.device("cuda"), flash=True)
        assert shared.free == free, "ranks that share a GPU share what is free"


def test_auto_takes_what_is_free_less_what_the_phase_takes(one_rank):
    _, parallel = one_rank
    assert agree_on_blocks(SHAPE, Room(47_000, 35_000), parallel) == 12
    for working in (43_500, 10**9):
        with pytest.raises(
            ValueError,
            match=r"kv_cache_gib=auto finds .* free [^;]*; one sequence of 130 tokens .* Lower generation.feat",
        ):
            agree_on_blocks(SHAPE, Room(47_000, working), parallel)


def _blocks(folder: str, layout: ParallelConfig) -> list[int]:
    _, parallel = start(folder, layout)
    rank = dist.get_rank()
    blocks = [agree_on_blocks(SHAPE, Room(20_000 - 8000 * rank, 1000), parallel)]
    with pytest.raises(ValueError, match="kv_cache_gib=auto"):
        agree_on_blocks(SHAPE, Room(20_000 - 17_000 * rank, 0), parallel)
    return blocks


@pytest.mark.parametrize("layout", [ParallelConfig(tensor=2), ParallelConfig(pipeline=2)])
def test_the_ranks_of_a_replica_take_the_smallest_and_fail_together(model_folder, layout):
    assert run_ranks(2, _blocks, model_folder, layout) == [[11], [11]]


def test_images_and_steps_are_counted_where_they_are(one_rank):
    model, parallel = one_rank
    language = model.architecture.language
    load = phase_load(model, parallel, GenerationConfig(max_requests=10, max_tokens_per_step=50))
    later = replace(load, is_first_stage=False)
    # Bytes of float32: a layer of 50 tokens, or the logits of 10 requests.
    layer = 50 * 4 * (5 * language.ffn_size + 4 * language.hidden_size)
    assert working_bytes(model.architecture, replace(later, is_last_stage=False)) == layer
    assert working_bytes(model.architecture, later) == max(layer, 10 * language.vocab_size * 24)
    halves = replace(later, is_last_stage=False, tensor=2, sequence=True)
    assert working_bytes(model.architecture, halves) == 50 * 4 * (5 * language.ffn_size + 5 * language.hidden_size) // 2
    graphs = replace(later, is_last_stage=False, max_requests=100, max_tokens_per_step=100, cuda_graphs=True)
    outputs = 2 * (64 + 128) * language.hidden_size * 4
    assert working_bytes(model.architecture, graphs) == 2 * layer + outputs
    first = working_bytes(model.architecture, load)
    assert working_bytes(model.architecture, replace(load, feature_bytes=7)) == first + 7
    embedding = load.prompt_tokens * language.hidden_size * 4
    assert working_bytes(model.architecture, replace(load, prompts_in_flight=9)) == first + 8 * embedding


def test_the_rule_of_a_cpu_needs_no_gpu_and_tokens_do_not_depend_on_it(one_rank, monkeypatch):
    model, parallel = one_rank
    settings = GenerationConfig(kv_cache_gib="auto", max_requests=3, max_tokens_per_step=40)
    load = phase_load(model, parallel, settings)
    context = make_context(model, parallel, settings, load, 100)
    assert context.block_allocator.total_count == 3 * 2 + 1, "1 GiB is more than all requests need"
    prompts = make_prompts(model, 3)
    auto = generate(make_engine(model, parallel, kv_cache_gib="auto"), prompts, FeatureCache(0))
    assert auto == generate(make_engine(model, parallel), prompts, FeatureCache(0))
    monkeypatch.setattr(cache_size, "_CPU_BYTES", 100)
    with pytest.raises(ValueError, match="kv_cache_gib=auto finds"):
        generate(make_engine(model, parallel, kv_cache_gib="auto"), prompts, FeatureCache(0))


def test_features_that_are_kept_need_no_room_again(one_rank):
    engine = make_engine(*one_rank)
    features = FeatureCache(1000)
    features.bytes_used = 300
    assert engine._load(features, 4).feature_bytes == 700
    assert engine._load(features, 4).prompts_in_flight == 4


def test_prompts_in_flight_are_those_that_have_room_and_are_there(one_rank):
    engine = make_engine(*one_rank, max_requests=20)
    prompts = make_prompts(engine.model, 9)
    assert [engine._count_in_flight(prompts, responses) for responses in (1, 3, 8)] == [9, 7, 3]
    assert engine._count_in_flight(iter(prompts), 1) == 20, "nobody knows how many come"
    queue = SharedPromptQueue(prompts[:3], context=engine.parallel, name="in-flight", own=prompts[3:5])
    assert engine._count_in_flight(queue, 1) == len(queue) == 5
