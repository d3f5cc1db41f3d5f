"""Responses that go on in the next step: who does, what is trained, and that a run is the same however it is split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_r1v2.checkpoint.megatron.run_folder import finished_checkpoints
from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.data.samples import DataError
from megatron_r1v2.parallel import groups
from megatron_r1v2.stages.grpo import stage
from megatron_r1v2.stages.grpo.segments import GroupsInFlight, check_enough_prompts
from megatron_r1v2.types import Prompt, Rollout
from tests.ranks import run_ranks
from tests.stages.runs import (
    Ranks,
    assert_same_end,
    checkpoint_contents,
    differences,
    has_line,
    read_metrics,
    read_rollouts,
    recipe_for,
    run_stage,
    without_timings,
)
from tests.stages.scripted import make_prompt

# Of 6 tokens at most; untrained responses of the tiny model have all lengths.
SEGMENTS = (
    "generation.segment_tokens=2",
    "train.prompts_per_step=3",
    "train.learning_rate=0.01",
    "checkpoint.every_steps=1",
)


def end(run: Path) -> dict:
    return checkpoint_contents(finished_checkpoints(run / "checkpoints")[-1])


def rollouts(prompt: Prompt, *reasons: str, step: int = 0, length: int = 2) -> list[Rollout]:
    return [
        Rollout(prompt.key, sample, (7,) * length, (-0.5,) * length, step, reason, step=step)
        for sample, reason in enumerate(reasons)
    ]


def settle_on_ranks() -> list:
    """Let each of two ranks hold one group of two; return what each is told, then what goes on."""
    context = groups.initialize(ParallelConfig(), seed=1)
    prompts = [make_prompt(key, tiles=3) for key in ("b", "a")]
    mine = prompts[context.data_rank]
    flying = GroupsInFlight(context, max_age=2)
    first = flying.settle(prompts, rollouts(mine, "stop", "segment"))
    told = flying.settle([], rollouts(mine, "stop", "stop", length=4))
    tiles = [prompt.tiles_TCHW.shape[0] for prompt in told[0]]
    keys = [rollout.prompt_key for rollout in told[1]]
    return [first, [prompt.key for prompt in told[0]], tiles, keys, flying.steps]


def test_every_rank_is_told_all_complete_groups_in_one_order():
    results = run_ranks(2, settle_on_ranks)
    for rank, (first, keys, tiles, own, steps) in enumerate(results):
        assert first == ([], [])
        assert keys == ["b", "a"], "the order of the step in which they began"
        assert tiles[rank] == 3
        assert tiles[1 - rank] == 1, "enough to tell the modality"
        assert own == [keys[rank]] * 2
        assert steps == {}


@pytest.fixture
def context(monkeypatch):
    """Return a context of one replica, without process groups."""
    monkeypatch.setattr("megatron_r1v2.parallel.objects.all_gather", lambda item, _group: [item])
    return SimpleNamespace(data_rank=0, data_size=1, groups=SimpleNamespace(dp=None))


def test_groups_go_on_until_all_responses_have_ended(context):
    one, two = (make_prompt(key, tiles=1) for key in ("one", "two"))
    flying = GroupsInFlight(context, max_age=5)
    prompts, ended = flying.settle([one, two], [*rollouts(one, "stop", "segment"), *rollouts(two, "length", "stop")])
    assert [prompt.key for prompt in prompts] == ["two"]
    assert [rollout.finish_reason for rollout in ended] == ["length", "stop"]
    assert flying.prompts == [one]
    assert flying.steps == {"one": 0}
    three = make_prompt("three", tiles=0)
    later = [*rollouts(three, "stop", "stop", step=1), *rollouts(one, "stop", "length", length=6)]
    prompts, ended = flying.settle([three], later)
    assert [prompt.key for prompt in prompts] == ["one", "three"], "the older group first"
    assert [len(rollout.token_ids) for rollout in ended] == [6, 6, 2, 2]
    assert not flying.groups


def test_the_new_tokens_of_all_responses_of_a_group_get_old_log_probs(context):
    prompt = make_prompt("one", tiles=1)
    flying = GroupsInFlight(context, max_age=5)
    flying.settle([prompt], rollouts(prompt, "stop", "segment"))
    samples, prompts = flying.new_segments()
    assert samples.keys() == {"one/0/0", "one/0/1"}
    assert prompts == {"one": prompt}
    done = {name: replace(each, rl=replace(each.rl, old_log_probs=(-1.0, -2.0))) for name, each in samples.items()}
    assert flying.add_old_log_probs(done) == 0
    assert flying.new_segments()[0] == {}
    grown = replace(flying.responses["one"][1], token_ids=(7,) * 4, rollout_log_probs=(-0.5,) * 4)
    flying.settle([], [flying.responses["one"][0], grown])
    samples, _ = flying.new_segments()
    assert samples.keys() == {"one/0/1"}
    assert samples["one/0/1"].rl.old_log_probs == (-1.0, -2.0), "the first segment keeps its own"


def test_log_probs_that_are_not_finite_drop_the_groups(context):
    prompt = make_prompt("one", tiles=1)
    flying = GroupsInFlight(context, max_age=5)
    flying.settle([prompt], rollouts(prompt, "stop", "segment"))
    assert flying.add_old_log_probs(None) == 1
    assert not flying.groups
    assert not flying.steps


def test_groups_beyond_the_age_of_the_buffer_are_dropped(context):
    old, young = (make_prompt(key, tiles=1) for key in ("old", "young"))
    flying = GroupsInFlight(context, max_age=2)
    flying.settle([old], rollouts(old, "segment", "stop"))
    flying.settle([young], [*rollouts(young, "segment", "segment", step=1), *rollouts(old, "segment", "stop")])
    assert flying.drop_old(2) == 0
    assert flying.drop_old(3) == 1
    assert flying.steps == {"young": 1}
    assert flying.prompts == [young]


def test_the_state_goes_to_as_many_replicas_as_there_are(context, tmp_path):
    prompts = [replace(make_prompt(f"p{place}", tiles=2), images=(b"png",), facts={"left": "3"}) for place in range(3)]
    flying = GroupsInFlight(context, max_age=5)
    flying.settle(prompts, [rollout for prompt in prompts for rollout in rollouts(prompt, "segment", "stop")])
    torch.save(flying.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = GroupsInFlight(context, max_age=5, shards=[saved])
    assert again.responses == flying.responses
    assert [prompt.images for prompt in again.prompts] == [(b"png",)] * 3
    assert torch.equal(again.prompts[0].tiles_TCHW, prompts[0].tiles_TCHW)
    held = []
    for rank in range(2):
        context.data_rank, context.data_size = rank, 2
        part = GroupsInFlight(context, max_age=5, shards=[saved])
        assert part.steps == flying.steps, "what is drawn anew is the same on every rank"
        held.append([prompt.key for prompt in part.prompts])
    assert held == [["p0", "p2"], ["p1"]]


def test_a_run_trains_groups_when_they_are_complete(root: Path, tmp_path: Path, monkeypatch) -> None:
    """Without a learning rate every segment is sampled by the same weights: all ratios are 1."""
    monkeypatch.setattr(stage, "ROLLOUTS_KEPT", 1000)
    run = run_stage(
        recipe_for(root, tmp_path / "run", (*SEGMENTS, "train.steps=8", "train.learning_rate=0", "buffer.capacity=0"))
    )
    lines = read_metrics(run)
    assert lines[0]["rollout/groups_in_flight"] > 0
    assert lines[0]["rollout/responses"] < 12
    assert sum(line["rollout/responses"] for line in lines) == 8 * 12 - 4 * lines[-1]["rollout/groups_in_flight"]
    assert any(len(row["text"]) > 0 and row["response_tokens"] > 2 for row in read_rollouts(run))
    assert max(row["response_tokens"] for row in read_rollouts(run)) == 6
    trained = [line for line in lines if line.get("actor/ppo_kl") is not None and line["actor/updates"]]
    assert trained
    for line in trained:
        assert line["actor/ppo_kl"] == pytest.approx(0, abs=1e-5)
        assert line["actor/pg_clipfrac"] == 0
        assert line["rollout_corr/log_prob_abs_diff"] < 1e-5


def test_earlier_segments_are_weighed_against_the_weights_that_sampled_them(root: Path, tmp_path: Path) -> None:
    settings = (*SEGMENTS, "train.steps=6", "train.parts=[adapter, language]", "buffer.capacity=0")
    lines = read_metrics(run_stage(recipe_for(root, tmp_path / "run", settings)))
    assert max(abs(line.get("actor/ppo_kl", 0)) for line in lines) > 1e-4, "the weights have moved between segments"
    compared = [line["rollout_corr/log_prob_abs_diff"] for line in lines if "rollout_corr/log_prob_abs_diff" in line]
    assert compared
    assert max(compared) < 1e-5, "engine and trainer are compared on the tokens of this step's weights"


@pytest.fixture(scope="module")
def uninterrupted(root: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("segments") / "run"
    return run_stage(recipe_for(root, output, (*SEGMENTS, "train.steps=4")))


def test_a_killed_run_ends_with_the_same_bits(root: Path, tmp_path: Path, uninterrupted: Path) -> None:
    recipe = recipe_for(root, tmp_path / "run", (*SEGMENTS, "train.steps=4"))
    started = Ranks(recipe)
    started.kill_when(lambda: has_line(tmp_path / "run", "metrics.jsonl", 2))
    Ranks(recipe).wait()
    assert_same_end(tmp_path / "run", uninterrupted, rounded=True)


def test_two_replicas_train_what_one_does(root: Path, tmp_path: Path, uninterrupted: Path) -> None:
    Ranks(recipe_for(root, tmp_path / "run", (*SEGMENTS, "train.steps=4")), world_size=2).wait()
    one, two = (without_timings(read_metrics(run)) for run in (uninterrupted, tmp_path / "run"))
    for name in ("rollout/responses", "rollout/tokens", "rollout/groups_in_flight", "ssb/size", "reward/answer/mean"):
        assert [line.get(name) for line in two] == pytest.approx([line.get(name) for line in one], nan_ok=True)
    ours, theirs = (end(run)["state.pt"]["buffer"] for run in (tmp_path / "run", uninterrupted))
    assert differences(ours, theirs) == []


def test_segments_and_dynamic_sampling_are_refused_together(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"generation\.segment_tokens=2 with algorithm\.dynamic_sampling_rounds=3"):
        recipe_for(root, tmp_path / "run", (*SEGMENTS, "algorithm.dynamic_sampling_rounds=3"))


def test_the_longest_response_must_end_within_the_age_of_the_buffer(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"segment_tokens=2 x buffer\.max_age=2 is less than .*max_response_tokens=6"):
        recipe_for(root, tmp_path / "run", (*SEGMENTS, "buffer.max_age=2"))
    recipe_for(root, tmp_path / "run", (*SEGMENTS, "buffer.max_age=3"))


def test_the_prompts_in_flight_must_not_be_all_there_are(root: Path, tmp_path: Path) -> None:
    recipe = recipe_for(root, tmp_path / "run", SEGMENTS)
    check_enough_prompts(9, recipe)
    with pytest.raises(DataError, match=r"data\.train has 8 prompts.* 3 x train\.prompts_per_step=3"):
        check_enough_prompts(8, recipe)
    check_enough_prompts(3, recipe.changed(generation=recipe.generation.changed(segment_tokens=0)))
