"""Scripted responses, shares of a queue, a full cache, unseen files and features of prompts that are not there."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext

from megatron_r1v2.generation import context
from megatron_r1v2.generation.engine import RolloutEngine, Sampling, empty_rollouts
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.generation.queue import SharedPromptQueue
from megatron_r1v2.rehearsal import stand_ins
from megatron_r1v2.rehearsal.rows import LONG, SHORT
from megatron_r1v2.rehearsal.watch import Watch

STOP = 9
SCRIPT = stand_ins.Script(
    drawn=(1, 1, STOP),
    filler=1,
    right=(5, STOP),
    wrong=(6, STOP),
    max_prompt_tokens=20,
    max_response_tokens=10,
    mixed_groups=1,
)


def rollout_of(key, sample_index, *, count=3, begun=0):
    engine = SimpleNamespace(stop_ids={STOP}, max_prompt_tokens=20 + begun)
    sampling = Sampling(num_responses=2, policy_version=7, temperature=1.0, max_response_tokens=10)
    empty = empty_rollouts(SimpleNamespace(key=key), sampling)[sample_index]
    return RolloutEngine._extend(engine, empty, (1,) * (count - 1) + (STOP,), (-0.5,) * count, sampling)


@pytest.mark.parametrize(
    ("key", "sample_index", "end"),
    [
        (f"{LONG}-0-0", 0, 5),
        (f"{LONG}-0-0", 1, 6),
        (f"{LONG}-1-0", 0, 5),
        (f"{LONG}-0-1", 0, 6),  # of no mixed group
    ],
)
def test_responses_to_long_prompts_have_the_full_length_and_a_scripted_end(undone, key, sample_index, end):
    stand_ins.install_script(SCRIPT)
    rollout = rollout_of(key, sample_index)
    assert rollout.token_ids == (1,) * 8 + (end, STOP)
    assert len(rollout.rollout_log_probs) == 10
    assert (rollout.policy_version, rollout.finish_reason) == (7, "stop")


def test_a_continued_response_is_shorter_by_its_beginning_and_wrong(undone):
    stand_ins.install_script(SCRIPT)
    assert rollout_of(f"{LONG}-0-0/without-images", 0, begun=4).token_ids == (1,) * 4 + (6, STOP)


@pytest.mark.parametrize(("key", "count"), [(f"{SHORT}-0-0", 3), (f"{LONG}-0-0", 2)])
def test_short_responses_stay_as_they_were_drawn(undone, key, count):
    stand_ins.install_script(SCRIPT)
    assert len(rollout_of(key, 0, count=count).token_ids) == count


def test_a_replica_takes_every_nth_prompt_of_each_queue(undone):
    announced, stored = [], {}

    class Store:
        def set(self, key, value):
            stored[key] = int(value)

        def add(self, key, amount):
            stored[key] += amount
            return stored[key]

    def queue(name):
        made = SharedPromptQueue.__new__(SharedPromptQueue)
        made._counter = name
        made._context = SimpleNamespace(
            data_rank=1,
            data_size=3,
            is_replica_leader=True,
            store=Store(),
            device="cpu",
            tensor_size=1,
            pipeline_size=1,
        )
        return made

    stand_ins.install_shares(announced.append)
    first, second = queue("a"), queue("b")
    assert [first._take(), first._take(), second._take(), first._take()] == [1, 4, 1, 7]
    assert announced == [1, 4, 1, 7]
    assert set(stored) == {"a/1", "b/1"}, "no replica counts for another"


class Cache:
    """What `install_full_cache` looks at of a context."""

    def __init__(self, *, decoding, prefilling, offsets):
        self.num_decode_requests, self.num_prefill_requests = decoding, prefilling
        self.block_size_tokens = 4
        self.request_last_kv_block_offset = torch.tensor(offsets)
        self.paused_request_count, self.total_request_count = 0, len(offsets)
        self.block_allocator = SimpleNamespace(active_count=100, get_active_used=lambda: 12)


def test_the_cache_is_full_once_where_a_request_wants_a_block(undone):
    allowed = []

    def update(self, active):
        allowed.append(self.block_allocator.active_count)
        is_full = self.block_allocator.active_count == 12
        return {"evict_request_ids": torch.tensor([3]) if is_full else None}

    undone.setattr(DynamicInferenceContext, "update_requests", update)
    due = [True]
    counts = stand_ins.install_full_cache(lambda: due[0])
    step = DynamicInferenceContext.update_requests
    both, one = torch.tensor([1, 1]), torch.tensor([0, 1])
    within = Cache(decoding=0, prefilling=2, offsets=[1, 2])
    step(within, both)
    cache = Cache(decoding=1, prefilling=1, offsets=[1, 3])
    step(cache, one)  # the other one has ended: evicting the last leaves none
    due[0] = False
    step(cache, both)
    due[0] = True
    step(cache, both)
    step(cache, both)
    step(Cache(decoding=2, prefilling=0, offsets=[1, 1]), both)
    assert allowed == [100, 100, 100, 12, 100, 100]
    assert cache.block_allocator.active_count == 100
    assert counts == {"prefill": 1, "mixed": 4, "decode": 1, "evicted": 1}


def test_the_zeros_of_a_cache_are_written_by_torch(undone):
    stand_ins.install_counted_cache()
    cache = torch.ones(3)
    assert context.lazy_zeros(cache) is cache
    assert not cache.any()


def test_files_are_read_and_written_unseen(undone, tmp_path):
    stand_ins.install_files()
    with Watch("cpu") as watch:
        tensor = torch.ones(3)
        seen = watch.num_operators
        torch.save(tensor, tmp_path / "file")
        loaded = torch.load(tmp_path / "file")
    assert watch.num_operators == seen
    assert torch.equal(loaded, tensor)


def test_features_of_the_prompts_of_a_whole_step_fill_the_cache(undone):
    stand_ins.install_stand_in_features(rehearsed=2, prompts_of_step=5)
    cache = FeatureCache(2**20)
    features = torch.ones(1, 2, 3)
    cache._keep(f"{LONG}-0-0", features)
    assert len(cache._features) == 1
    cache._keep(f"{LONG}-0-1", features)
    assert len(cache._features) == 5
