"""The samples that a step trains on: by hand on one rank, and the same for any split of the responses over ranks."""

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_r1v2.config.choices import EffectiveBy
from megatron_r1v2.config.recipes import GrpoRecipe
from megatron_r1v2.config.schema import (
    AlgorithmConfig,
    BufferConfig,
    GenerationConfig,
    LossAggregation,
    LossConfig,
    ParallelConfig,
    RewardConfig,
    RewardFunction,
    TrainConfig,
)
from megatron_r1v2.parallel import groups
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.rl.sample_buffer import BufferEntry, SampleBuffer
from megatron_r1v2.stages.grpo.selection import (
    SampleRecord,
    check_answers,
    count_effective_groups,
    fresh_sample,
    sample_id,
    select,
    telling_responses,
)
from megatron_r1v2.training.batches import with_old_log_probs
from megatron_r1v2.training.replay import ReplayStore, send_to_trainers
from tests.ranks import run_ranks
from tests.stages.scripted import GROUP, make_prompt, same_prompt, step_prompts, step_responses

STEPS = 6
ALL_OF_RANK_1 = 3
"""In this step rank 0 of two has no response."""


def recipe(**sections: Any) -> GrpoRecipe:
    settings = {"generation": GenerationConfig(responses_per_prompt=GROUP), "buffer": BufferConfig(capacity=20)}
    return GrpoRecipe(**(settings | sections))


def new_buffer(max_age: int = 3) -> SampleBuffer:
    return SampleBuffer(capacity=20, max_age=max_age, priority_exponent=1.0, balance_modalities=True)


def responses_of_rank(responses: list, step: int, context: ParallelContext) -> list:
    """Give two ranks unequal parts, whole groups, out of order; one rank everything."""
    if context.data_size == 1:
        return responses
    owner = {
        response.rollout.prompt_key: 1 if step == ALL_OF_RANK_1 else int(number % 3 == 0)
        for number, response in enumerate(responses[::GROUP])
    }
    return [response for response in reversed(responses) if owner[response.rollout.prompt_key] == context.data_rank]


def reload(store: ReplayStore, context: ParallelContext) -> ReplayStore:
    """Save every rank's shard and load it again."""
    buffer = io.BytesIO()
    torch.save(store.state_dict(), buffer)
    buffer.seek(0)
    shards: list = [None] * context.data_size
    torch.distributed.all_gather_object(shards, torch.load(buffer, weights_only=True), group=context.groups.dp)
    loaded = ReplayStore()
    loaded.load_state_dicts(shards, data_rank=context.data_rank, data_size=context.data_size)
    return loaded


def run_steps(context: ParallelContext, settings: GrpoRecipe) -> list[dict[str, Any]]:
    """Do what the stage does in each step, but generate and train."""
    buffer, store, results = new_buffer(), ReplayStore(), []
    for step in range(STEPS):
        prompts = step_prompts(step)
        by_key = {prompt.key: prompt for prompt in prompts}
        scored = responses_of_rank(step_responses(prompts, step), step, context)
        selection = select(settings, buffer, prompts, scored, step=step, trains_text=True, context=context)
        held = dict(store.samples)
        for response in scored:
            name = sample_id(response.rollout)
            held[name] = fresh_sample(response, by_key[response.rollout.prompt_key], selection.records[name])
        samples, sample_prompts = send_to_trainers(
            held, store.prompts | by_key, selection.trainer, group=context.groups.dp, device=context.device
        )
        dropped = buffer.add(selection.fresh_entries, step)
        fresh = {
            name: with_old_log_probs(sample, torch.full([len(sample.token_ids)], -1.0))
            for name, sample in samples.items()
            if name in selection.plan.fresh
        }
        store.add(fresh, sample_prompts)
        store.drop(dropped)
        if step == 2:
            store = reload(store, context)
        results.append(
            {
                "selection": selection,
                "samples": samples,
                "prompts": sample_prompts,
                "stored": dict(store.samples),
                "buffer": buffer.state_dict(),
            }
        )
    return results


def run_on_ranks(settings: dict[str, GrpoRecipe]) -> dict[str, list[dict[str, Any]]]:
    context = groups.initialize(ParallelConfig(), seed=1)
    return {name: run_steps(context, value) for name, value in settings.items()}


RECIPES: dict[str, Callable[[], GrpoRecipe]] = {
    "usual": recipe,
    "two updates of tokens, rewards shuffled": lambda: recipe(
        train=TrainConfig(updates_per_step=2),
        algorithm=AlgorithmConfig(kl_coefficient=0.1),
        loss=LossConfig(aggregation=LossAggregation.token),
        reward=RewardConfig(shuffle=True),
    ),
}


@pytest.fixture(scope="module")
def context():
    yield groups.initialize(ParallelConfig(), seed=1)
    groups.shut_down()


@pytest.fixture(scope="module")
def one_rank(context) -> dict[str, list[dict[str, Any]]]:
    return {name: run_steps(context, make()) for name, make in RECIPES.items()}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, list[dict[str, Any]]]]:
    return run_ranks(2, run_on_ranks, {name: make() for name, make in RECIPES.items()})


def test_the_script_replays_from_both_ranks(one_rank, two_ranks):
    """Else the comparison below would compare nothing."""
    steps = one_rank["usual"]
    assert sum(bool(step["selection"].plan.replayed) for step in steps) >= 3
    assert any(step["selection"].plan.replaced for step in steps)
    moved = 0
    for before, now in zip(range(STEPS), range(1, STEPS), strict=False):
        for rank in (0, 1):
            had = set(two_ranks[rank]["usual"][before]["stored"])
            replayed = set(two_ranks[1 - rank]["usual"][now]["selection"].plan.replayed)
            moved += len(had & replayed & set(two_ranks[1 - rank]["usual"][now]["samples"]))
    assert moved > 0, "no replayed sample travelled to another rank"


@pytest.mark.parametrize("name", RECIPES)
def test_the_choice_does_not_depend_on_the_number_of_ranks(name, one_rank, two_ranks):
    for step, alone in enumerate(one_rank[name]):
        for rank in two_ranks:
            selection, expected = rank[name][step]["selection"], alone["selection"]
            assert selection.records == expected.records
            assert selection.plan == expected.plan
            assert selection.updates == expected.updates
            assert selection.denominator == expected.denominator
            assert selection.metrics == expected.metrics
            assert rank[name][step]["buffer"] == alone["buffer"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_sample_arrives_at_its_trainer_with_its_tiles(name, one_rank, two_ranks):
    for step, alone in enumerate(one_rank[name]):
        arrived: dict = {}
        for data_rank, rank in enumerate(two_ranks):
            there = rank[name][step]
            trainer = there["selection"].trainer
            assert set(there["samples"]) == {key for key, owner in trainer.items() if owner == data_rank}
            assert set(there["prompts"]) == {sample.prompt_key for sample in there["samples"].values()}
            for key, prompt in there["prompts"].items():
                assert same_prompt(prompt, alone["prompts"][key])
            arrived |= there["samples"]
        assert arrived == alone["samples"]
        assert alone["samples"].keys() == {key for update in alone["selection"].updates for key in update}


def test_the_ranks_store_what_the_buffer_lists(one_rank, two_ranks):
    for step, alone in enumerate(one_rank["usual"]):
        listed = {entry["sample_id"] for entry in alone["buffer"]["entries"]}
        shards = [rank["usual"][step]["stored"] for rank in two_ranks]
        assert not shards[0].keys() & shards[1].keys()
        assert shards[0] | shards[1] == alone["stored"]
        assert set(alone["stored"]) == listed


def test_replayed_samples_keep_their_log_probs_and_fresh_ones_have_none(one_rank):
    for step in one_rank["usual"]:
        for name, sample in step["samples"].items():
            assert bool(sample.rl.old_log_probs) == (name in step["selection"].plan.replayed)


def test_advantages_and_effectiveness_by_hand(context):
    prompt = make_prompt("p", tiles=1)
    responses = [
        replace(response, total=total, rule_correct=total > 1)
        for response, total in zip(step_responses([prompt], 0), (2.0, 0.0, 0.0, 2.0), strict=True)
    ]
    selection = select(recipe(), None, [prompt], responses, step=4, trains_text=True, context=context)
    records = [selection.records[f"p/0/{index}"] for index in range(GROUP)]
    assert [item.advantage for item in records] == pytest.approx(
        [1 / (1 + 1e-6), -1 / (1 + 1e-6), -1 / (1 + 1e-6), 1 / (1 + 1e-6)], rel=1e-9
    )
    assert all(item.entry.effective for item in records)
    assert selection.denominator == 4
    sample = fresh_sample(responses[1], prompt, records[1])
    assert sample.token_ids == prompt.token_ids + responses[1].rollout.token_ids
    assert sample.prompt_length == len(prompt.token_ids)
    assert (sample.rl.advantage, sample.rl.reward, sample.rl.old_log_probs) == (records[1].advantage, 0.0, ())
    assert (sample.sample_index, sample.rl.policy_version, sample.rl.group_effective) == (1, 0, True)


def test_a_group_that_differs_in_other_parts_alone_is_not_effective(context):
    prompt = make_prompt("p", tiles=1)
    responses = [
        replace(response, total=total, rule_correct=True)
        for response, total in zip(step_responses([prompt], 0), (1.2, 1.4, 1.1, 1.3), strict=True)
    ]
    selection = select(recipe(), None, [prompt], responses, step=4, trains_text=True, context=context)
    assert all(item.advantage != 0 for item in selection.records.values())
    assert not any(item.entry.effective for item in selection.records.values())
    assert selection.metrics["ssb/fresh_effective_fraction"] == 0


def test_text_only_responses_are_left_out_and_counted_when_text_has_no_gradient(context):
    prompts = step_prompts(0)
    responses = step_responses(prompts, 0)
    text = {prompt.key for prompt in prompts if prompt.modality == "text"}
    assert len(text) == 2
    arguments = {"step": 0, "context": context}
    with_text = select(recipe(), None, prompts, responses, trains_text=True, **arguments)
    without = select(recipe(), None, prompts, responses, trains_text=False, **arguments)
    assert with_text.metrics["data/text_only_left_out"] == 0
    assert without.metrics["data/text_only_left_out"] == 2 * GROUP
    assert with_text.plan.num_sequences == 6 * GROUP
    assert without.plan.num_sequences == 4 * GROUP, "they are not in the denominator either"
    assert without.records.keys() == with_text.records.keys(), "but in the metrics"
    assert without.metrics["ssb/fresh_effective_fraction"] == with_text.metrics["ssb/fresh_effective_fraction"]
    chosen = {entry.prompt_key for entry in without.fresh_entries}
    assert not chosen & text
    assert not {name.split("/")[0] for name in without.trainer} & text


def test_a_step_of_text_alone_trains_nothing_when_text_has_no_gradient(context):
    prompts = [prompt for prompt in step_prompts(0) if prompt.modality == "text"]
    responses = step_responses(prompts, 0)
    selection = select(recipe(), None, prompts, responses, step=0, trains_text=False, context=context)
    assert (selection.updates, dict(selection.trainer)) == ((), {})
    assert selection.metrics["data/text_only_left_out"] == len(responses)


@pytest.mark.parametrize("aggregation", list(LossAggregation))
@pytest.mark.parametrize("kl_coefficient", [0.0, 0.1])
def test_samples_without_advantage_are_in_the_denominator_and_computed_only_for_the_kl(
    context, aggregation, kl_coefficient
):
    # All responses to p and r are right, and one to q and s each.
    prompts = [make_prompt(key, tiles=1) for key in "pqrs"]
    right = [index % (2 * GROUP) <= GROUP for index in range(4 * GROUP)]
    responses = [
        replace(response, total=float(correct), rule_correct=correct)
        for response, correct in zip(step_responses(prompts, 0), right, strict=True)
    ]
    settings = recipe(
        algorithm=AlgorithmConfig(kl_coefficient=kl_coefficient),
        loss=LossConfig(aggregation=aggregation),
        train=TrainConfig(updates_per_step=2),
    )
    selection = select(settings, None, prompts, responses, step=0, trains_text=True, context=context)
    computed = {f"{key}/0/{index}" for key in "qs" for index in range(GROUP)}
    if kl_coefficient:
        computed |= {f"{key}/0/{index}" for key in "pr" for index in range(GROUP)}
    assert {name for update in selection.updates for name in update} == computed
    assert [len(update) for update in selection.updates] == [len(computed) // 2] * 2
    tokens = sum(len(response.rollout.token_ids) for response in responses)
    total = tokens if aggregation is LossAggregation.token else len(responses)
    assert selection.denominator == total / 2


def test_fewer_prompts_than_updates_give_fewer_updates(context):
    prompts = [make_prompt(key, tiles=1) for key in "pq"]
    responses = [
        replace(response, total=float(index), rule_correct=index % GROUP > 0)
        for index, response in enumerate(step_responses(prompts, 0))
    ]
    settings = recipe(train=TrainConfig(updates_per_step=9))
    selection = select(settings, None, prompts, responses, step=0, trains_text=True, context=context)
    assert [len(update) for update in selection.updates] == [GROUP] * 2
    assert selection.denominator == GROUP


@pytest.mark.parametrize("name", RECIPES)
def test_the_responses_to_a_prompt_are_trained_together(name, two_ranks):
    """Fresh and replayed, so that they share its tokens: in one update, on one rank."""
    met = 0
    for there in two_ranks[0][name]:
        selection, updates = there["selection"], []
        for update in selection.updates:
            owners: dict[str, set[int]] = {}
            for name_of_sample in update:
                key = name_of_sample.rsplit("/", 2)[0]
                owners.setdefault(key, set()).add(selection.trainer[name_of_sample])
            assert all(len(ranks) == 1 for ranks in owners.values())
            met += len(update) - len(owners)
            updates += owners
        assert len(updates) == len(set(updates))
        assert all(entry.prompt_length > 0 for entry in selection.fresh_entries), "prompts are part of the work"
    assert met > 0, "no prompt had several responses"


def test_length_metrics(context):
    prompts = step_prompts(1)
    responses = step_responses(prompts, 1)
    metrics = select(recipe(), None, prompts, responses, step=1, trains_text=True, context=context).metrics
    lengths = [len(response.rollout.token_ids) for response in responses]
    assert metrics["response_length/mean"] == pytest.approx(sum(lengths) / len(lengths))
    assert metrics["response_length/max"] == 9
    assert metrics["response_length/clip_ratio"] == lengths.count(9) / len(lengths) > 0


def test_dynamic_sampling_trains_on_the_first_effective_groups_alone(context) -> None:
    prompts = step_prompts(0) + step_prompts(1)
    scored = step_responses(prompts[:6], 0) + step_responses(prompts[6:], 1)
    by_key: dict[str, set[bool]] = {}
    for response in scored:
        by_key.setdefault(response.rollout.prompt_key, set()).add(response.rule_correct)
    effective = [prompt.key for prompt in prompts if len(by_key[prompt.key]) == 2]
    assert len(effective) > 3
    counted = {"effective_by": EffectiveBy.answer, "group_size": GROUP}
    assert count_effective_groups(scored, prompts, **counted, trains_text=True) == len(effective)
    with_image = [prompt.key for prompt in prompts if prompt.modality == "image" and prompt.key in effective]
    assert count_effective_groups(scored, prompts, **counted, trains_text=False) == len(with_image) < len(effective)
    settings = recipe(algorithm=AlgorithmConfig(dynamic_sampling_rounds=2), train=TrainConfig(prompts_per_step=3))
    selection = select(settings, None, prompts, scored, step=0, trains_text=True, context=context)
    assert {name.split("/")[0] for name in selection.plan.fresh} == set(effective[:3])
    assert selection.denominator == 3 * GROUP
    assert selection.metrics["ssb/trained_effective_fraction"] == 1.0
    assert selection.metrics["ssb/fresh_effective_fraction"] == len(effective) / len(prompts)
    assert selection.metrics["rollout/responses"] == len(scored)
    assert selection.metrics["rollout/responses_filtered"] == len(scored) - 3 * GROUP


def test_groups_without_answers_are_effective_by_their_rewards(context):
    prompts = [replace(prompt, answer=None, answer_type=None) for prompt in step_prompts(0, 12)]
    scored = [replace(response, rule_correct=False) for response in step_responses(prompts, 0)]
    totals: dict[str, list[float]] = {}
    for response in scored:
        totals.setdefault(response.rollout.prompt_key, []).append(response.total)
    effective = [key for key, values in totals.items() if max(values) > min(values)]
    assert 3 < len(effective) < 12
    counted = {"group_size": GROUP, "trains_text": True}
    assert count_effective_groups(scored, prompts, effective_by=EffectiveBy.reward, **counted) == len(effective)
    assert count_effective_groups(scored, prompts, effective_by=EffectiveBy.answer, **counted) == 0
    for rounds, chosen in ((1, effective), (2, effective[:3])):
        settings = recipe(
            buffer=BufferConfig(effective_by=EffectiveBy.reward),
            algorithm=AlgorithmConfig(dynamic_sampling_rounds=rounds),
            train=TrainConfig(prompts_per_step=3),
        )
        selection = select(settings, None, prompts, scored, step=0, trains_text=True, context=context)
        assert {entry.prompt_key for entry in selection.fresh_entries if entry.effective} == set(chosen)
        assert selection.metrics["ssb/fresh_effective_fraction"] == len(effective) / len(prompts)
    # The rewards of such a group teach too, however near to each other they are; the buffer does not keep them.
    near = [replace(response, total=0.5 + 0.001 * response.rollout.sample_index) for response in scored]
    settings = recipe(buffer=BufferConfig(effective_by=EffectiveBy.reward))
    selection = select(settings, None, prompts, near, step=0, trains_text=True, context=context)
    assert not any(entry.effective for entry in selection.fresh_entries)
    assert len(selection.fresh_entries) == len(near)


def test_answers_are_missed_before_anything_is_generated():
    judge = RewardFunction(path="reward.py", name="judge")
    check_answers([], RewardConfig(), EffectiveBy.answer)
    for judged in (RewardConfig(functions=(judge,)), RewardConfig(model_weight=1.0)):
        check_answers(["p0-1"], judged, EffectiveBy.reward)
        with pytest.raises(ValueError, match=r"prompt 'p0-1' has no answer, .*set buffer.effective_by=reward"):
            check_answers(["p0-1"], judged, EffectiveBy.answer)
    with pytest.raises(ValueError, match=r"'p0-1' has no answer, and nothing judges .*answer_type, or .* \(2 prompts"):
        check_answers(["p0-1", "p0-2"], RewardConfig(), EffectiveBy.reward)
    shown = RewardConfig(functions=(judge.changed(weight=0.0),))
    with pytest.raises(
        ValueError, match="nothing judges its responses: no function of reward.functions has weight and"
    ):
        check_answers(["p0-1"], shown, EffectiveBy.reward)


def test_responses_to_show_are_of_several_prompts_right_and_wrong_first():
    def record(prompt: str, advantage: float, correct: bool) -> SampleRecord:
        entry = BufferEntry(f"{prompt}/{advantage}", prompt, abs(advantage), "image", 0, 5)
        return SampleRecord(entry.sample_id, advantage, 0.0, correct, entry)

    records = [
        *[record("easy", 0.0, True)] * 3,
        *[record("rare", value, correct) for value, correct in ((-0.4, False), (-0.3, False), (2.5, True))],
        *[record("even", value, correct) for value, correct in ((1.0, True), (-1.0, False), (0.9, True))],
    ]
    chosen = [records[place] for place in telling_responses(records, 6)]
    assert [(r.entry.prompt_key, r.advantage) for r in chosen] == [
        ("rare", 2.5),
        ("rare", -0.4),
        ("even", 1.0),
        ("even", -1.0),
        ("easy", 0.0),
        ("rare", -0.3),
    ]
    assert telling_responses(records, 0) == []
    assert len(telling_responses(records, 99)) == len(records)
