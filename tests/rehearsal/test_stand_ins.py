"""Scripted responses, shares of a queue, a full cache, unseen files and features of prompts that are not there."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext

from megatron_r1v2.config.choices import Part
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.generation import context
from megatron_r1v2.generation.controller import RolloutController
from megatron_r1v2.generation.engine import RolloutEngine, Sampling, empty_rollouts
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.generation.queue import SharedPromptQueue
from megatron_r1v2.rehearsal import stand_ins
from megatron_r1v2.rehearsal.preparation import MADE
from megatron_r1v2.rehearsal.rows import LONG, SHORT
from megatron_r1v2.rehearsal.watch import Watch
from megatron_r1v2.stages import loaded_reward_model
from megatron_r1v2.training.weight_verification import GATE_TOKENS
from tests.rehearsal.tiny_rehearsal import RECIPES

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


def rollout_of(key, sample_index, *, count=3, begun=0, segment_tokens=0, before=None, limit=10):
    engine = SimpleNamespace(stop_ids={STOP}, max_prompt_tokens=20 + begun)
    sampling = Sampling(3, policy_version=7, temperature=1.0, max_response_tokens=limit, segment_tokens=segment_tokens)
    before = before or empty_rollouts(SimpleNamespace(key=key), sampling)[sample_index]
    return RolloutEngine._extend(engine, before, (1,) * (count - 1) + (STOP,), (-0.5,) * count, sampling)


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


def test_a_response_of_segments_is_whole_but_for_the_last_one_and_then_whole(undone):
    stand_ins.install_script(replace(SCRIPT, whole_groups=1))
    begun = rollout_of(f"{LONG}-0-1", 0, segment_tokens=4)
    assert (begun.token_ids, begun.finish_reason, len(begun.rollout_log_probs)) == ((1,) * 6, "segment", 6)
    begun = replace(begun, old_log_probs=(-1.0,) * 6)
    # The engine draws more tokens to it in the next step, the same script as always.
    ended = rollout_of(f"{LONG}-0-1", 0, segment_tokens=4, before=begun)
    assert (ended.token_ids, ended.finish_reason) == ((1,) * 8 + (5, STOP), "stop"), "right: it is trained on"
    assert (len(ended.rollout_log_probs), ended.old_log_probs) == (10, (-1.0,) * 6)


@pytest.mark.parametrize(
    ("key", "sample_index", "segment_tokens"),
    [
        (f"{LONG}-0-0", 0, 4),  # a whole group
        (f"{LONG}-0-1", 2, 4),  # beside two that go on
        (f"{LONG}-0-1", 0, 0),  # of a validation, which has no segments
    ],
)
def test_other_responses_end_in_their_phase_with_segments_too(undone, key, sample_index, segment_tokens):
    stand_ins.install_script(replace(SCRIPT, whole_groups=1))
    rollout = rollout_of(key, sample_index, segment_tokens=segment_tokens)
    assert (len(rollout.token_ids), rollout.finish_reason) == (10, "stop")


def test_each_engine_draws_its_script_from_the_beginning(undone):
    drawn = []
    undone.setattr(RolloutController, "_dynamic_step_sample_logits", lambda self, _: drawn.append(list(self.scripted)))
    stand_ins.install_script(SCRIPT)
    for _ in range(2):
        controller = RolloutController.__new__(RolloutController)
        controller._context = SimpleNamespace(request_ids=torch.tensor([0, 1]), chunked_prefill_request_id=1)
        controller._active = lambda: slice(0, 2)
        for _ in range(3):
            controller._dynamic_step_sample_logits(None)
        del controller
    assert drawn == 2 * [[1, 1], [1, 1], [STOP, 1]], "a prompt that is not all there draws nothing that counts"


def test_a_continued_response_is_shorter_by_its_beginning_and_wrong(undone):
    stand_ins.install_script(SCRIPT)
    assert rollout_of(f"{LONG}-0-0/without-images", 0, begun=4).token_ids == (1,) * 4 + (6, STOP)


def test_a_response_of_the_gate_is_no_longer_than_the_gate_asks_for(undone):
    stand_ins.install_script(SCRIPT)
    assert len(rollout_of(f"{LONG}-0-0", 0, limit=GATE_TOKENS).token_ids) == 3
    assert len(rollout_of(f"{LONG}-0-0", 0, limit=GATE_TOKENS + 1).token_ids) == 10


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


def test_features_of_the_prompts_of_a_whole_step_fill_the_cache_before_the_last_one_is_encoded(undone):
    is_step = iter((True, True, True, False))
    stand_ins.install_stand_in_features(rehearsed=2, prompts_of_step=5, is_step=lambda: next(is_step))
    cache, held = FeatureCache(2**20), []
    model = SimpleNamespace(
        architecture=SimpleNamespace(tokens_per_tile=2, adapter_input_size=3), parameters=lambda: iter([torch.ones(1)])
    )

    def compute(prompts, model):
        held.append(len(cache._features))
        return [torch.ones(1, 2, 3) for _ in prompts]

    cache._compute = compute
    for number in (0, 1, 1):
        cache.fill([SimpleNamespace(key=f"{LONG}-0-{number}", tiles_TCHW=torch.ones(1, 3, 2, 2))], model)
    assert held[:2] == [0, 1 + 3]
    assert len(cache._features) == 5
    assert {tuple(features.shape) for features in cache._features.values()} == {(1, 2, 3)}
    of_validation = FeatureCache(2**20)
    of_validation._compute = compute
    for number in (2, 3):
        of_validation.fill([SimpleNamespace(key=f"{LONG}-0-{number}", tiles_TCHW=torch.ones(1, 3, 2, 2))], model)
    assert len(of_validation) == 2, "a validation is as long as it is"


@dataclass(frozen=True)
class Loaded:
    changed_parts: list[Part]


@pytest.mark.parametrize(
    ("checkpoint", "own", "parts"), [(MADE, "", [Part.score]), ("elsewhere", "elsewhere", [Part.adapter])]
)
def test_a_reward_model_that_is_not_here_is_the_base_with_a_head(undone, checkpoint, own, parts):
    def with_reward_model(recipe):
        return recipe.changed(model=recipe.model.changed(checkpoint=recipe.reward_model.checkpoint))

    undone.setattr(loaded_reward_model, "_with_reward_model", with_reward_model)
    undone.setattr(loaded_reward_model, "load_model", lambda *_, **__: Loaded([Part.adapter]))
    stand_ins.install_reward_model()
    recipe = load_recipe(RECIPES / "grpo.yaml", ["reward.model_weight=0.5", f"reward_model.checkpoint={checkpoint}"])
    read = loaded_reward_model._with_reward_model(recipe)
    assert (read.model.checkpoint, read.model.hf_path) == (own, recipe.model.hf_path)
    assert loaded_reward_model.load_model(read, None, score_head=True).changed_parts == parts
