"""Whole GRPO runs of a few steps on a random model: what they log, what they learn, what each setting changes."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

from megatron_r1v2.checkpoint.megatron.run_folder import finished_checkpoints
from megatron_r1v2.data.samples import parse_sample
from megatron_r1v2.data.shards import write_shards
from megatron_r1v2.data.stream import read_shards
from megatron_r1v2.stages.grpo import stage
from tests.stages.runs import (
    checkpoint_contents,
    differences,
    read_metrics,
    read_rollouts,
    recipe_for,
    run_stage,
    without_timings,
)
from tests.stages.tiny_run import write_data

Run = Callable[..., Path]
ALL_PARTS = "train.parts=[vision, adapter, language]"


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Run:
    """Return a function that runs with overrides, saving at the end only."""

    def start(*overrides: str, name: str = "run") -> Path:
        return run_stage(recipe_for(root, tmp_path / name, ("checkpoint.every_steps=0", *overrides)))

    return start


@pytest.fixture
def all_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep all rollouts, not only some for the report."""
    monkeypatch.setattr(stage, "ROLLOUTS_KEPT", 100)


@pytest.fixture(scope="module")
def one_step(root: Path, tmp_path_factory) -> Path:
    """Return a run of one step with all parts trained: what a change of settings is compared with."""
    output = tmp_path_factory.mktemp("one-step") / "run"
    return run_stage(recipe_for(root, output, ("train.steps=1", ALL_PARTS)))


def end(run: Path) -> dict:
    return checkpoint_contents(finished_checkpoints(run / "checkpoints")[-1])


def gradients(run: Path) -> dict[str, torch.Tensor]:
    """Return the gradient of a run of one step, from Adam's average; its norm is clipped to one."""
    prefix = "optimizer.state.exp_avg."
    return {
        name.removeprefix(prefix): value / 0.1 for name, value in end(run)["tensors"].items() if name.startswith(prefix)
    }


def relative_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return |a - b| / |b| over all parameters together."""
    assert ours.keys() == theirs.keys()
    difference = sum((ours[name] - theirs[name]).double().square().sum() for name in theirs)
    size = sum(value.double().square().sum() for value in theirs.values())
    assert size > 0
    return float((difference / size).sqrt())


def test_prompts_that_taught_nothing_get_other_responses_in_the_next_step(
    run: Run, tmp_path: Path, all_rollouts: None, capfd: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path / "data", images=2, texts=0)
    # All rewards are equal, so no step has an update, and the weights stay.
    own = tmp_path / "reward.py"
    own.write_text("def always_the_same(**_):\n    return 1\n")
    rewards = ("reward.answer_weight=0", "reward.format_weight=0", "buffer.effective_by=reward")
    rewards = (*rewards, f"reward.functions=[{{path: {own}, name: always_the_same}}]")
    found = run("train.steps=3", "train.prompts_per_step=2", f"data.train={tmp_path / 'data'}", *rewards)
    assert [step["actor/updates"] for step in read_metrics(found)] == [0, 0, 0]
    said = " ".join(capfd.readouterr().err.split())
    assert "step 3: no group of the last 3 steps was effective: all responses to a prompt earn the same reward" in said
    rows = read_rollouts(found)
    responses = [tuple(row["text"] for row in rows if row["step"] == step) for step in (1, 2, 3)]
    assert [len(texts) for texts in responses] == [8, 8, 8]
    assert len(set(responses)) == 3


def test_every_metric_is_there_and_rollouts_are_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "ROLLOUTS_KEPT", 4)
    folder = run("train.steps=3", "buffer.target_effective_fraction=0.9", "train.learning_rate=0.01")
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3]
    names = """actor/loss actor/grad_norm actor/lr actor/pg_clipfrac actor/ppo_kl critic/rewards/mean
        reward/answer/mean reward/format/mean response_length/mean response_length/max response_length/clip_ratio
        ssb/fresh_effective_fraction ssb/trained_effective_fraction ssb/distinct_samples
        ssb/gradient_share_replayed ssb/size
        perf/generated_tokens_per_second perf/prefill_tokens perf/prefill_tokens_separate
        rollout/evictions ssb/replayed rollout_corr/kl rollout_corr/k3_kl
        train/token_mult_prob_error train/token_mult_prob_error_image hallucination/rate hallucination/coverage
        timing_s/generate timing_s/reward timing_s/log_probs timing_s/update timing_s/step verifier/timeouts
        verifier/crashes data/corrupt_samples data/samples_read data/text_only_left_out"""
    for line in lines:
        assert set(names.split()) <= line.keys(), set(names.split()) - line.keys()
    assert "timing_s/save" in lines[-1]
    replaying = [line for line in lines if line["ssb/replayed"]]
    assert replaying
    of_replayed = {"ssb/clip_fraction_replayed", "ssb/age_mean", "ssb/age_max", "ssb/reuse_mean"}
    assert of_replayed <= replaying[-1].keys()
    # An age of nothing would be a lie.
    assert not any(of_replayed & line.keys() for line in lines if not line["ssb/replayed"])
    assert lines[0]["rollout_corr/log_prob_abs_diff"] < 1e-5
    assert lines[0]["actor/lr"] == pytest.approx(0.01)
    rollouts = read_rollouts(folder)
    assert [line["step"] for line in rollouts] == [1] * 4 + [2] * 4 + [3] * 4
    assert any(line["image_png"] for line in rollouts)
    weights = {"answer": 1.0, "format": 0.2}
    for line in rollouts:
        assert line["total"] == pytest.approx(sum(weights[name] * value for name, value in line["rewards"].items()))


def test_reward_rises_when_all_parts_train(run: Run) -> None:
    """A right answer is one word of two; a model that learns says one of them, then the right one."""
    small = ("data.max_tiles=1", "train.prompts_per_step=12", "algorithm.gate_every=16")
    lines = read_metrics(run("train.steps=16", ALL_PARTS, "train.learning_rate=0.01", *small))
    first, last = (fmean(line["reward/answer/mean"] for line in part) for part in (lines[:3], lines[-3:]))
    assert first < 0.25
    assert last > first + 0.25


def test_the_buffer_fills_the_batch_to_its_target(run: Run) -> None:
    folder = run("train.steps=6", "buffer.target_effective_fraction=0.75", "train.parts=[adapter, language]")
    lines = read_metrics(folder)
    assert lines[0]["ssb/replayed"] == 0
    assert lines[0]["ssb/trained_effective_fraction"] < 0.75
    enough = [
        now
        for before, now in itertools.pairwise(lines)
        if before["ssb/size"] + now["ssb/fresh_effective_fraction"] * 24 >= 18
    ]
    assert any(line["ssb/replayed"] for line in enough)
    for line in enough:
        assert line["ssb/trained_effective_fraction"] >= 0.75
        assert line.get("ssb/age_mean", 1) >= 1
        assert (line["ssb/gradient_share_replayed"] > 0) == (line["ssb/replayed"] > 0)
    held = end(folder)
    index = {entry["sample_id"] for entry in held["state.pt"]["buffer"]["entries"]}
    assert held["replay-0.pt"]["samples"].keys() == index
    for sample in held["replay-0.pt"]["samples"].values():
        assert sample["rl"]["advantage"] != 0
        assert len(sample["rl"]["old_log_probs"]) == len(sample["token_ids"]) - sample["prompt_length"]


def test_without_a_buffer_nothing_is_replayed(run: Run) -> None:
    folder = run("train.steps=3", "buffer.capacity=0")
    assert [line["ssb/replayed"] for line in read_metrics(folder)] == [0, 0, 0]
    assert "buffer" not in end(folder)["state.pt"]


def test_dynamic_sampling_generates_until_enough_groups_are_effective(run: Run) -> None:
    settings = ("train.steps=2", "train.prompts_per_step=4", "buffer.capacity=0", "train.parts=[language]")
    plain = read_metrics(run(*settings, name="plain"))
    lines = read_metrics(run(*settings, "algorithm.dynamic_sampling_rounds=3", name="dynamic"))
    assert [line["rollout/responses"] for line in plain] == [16, 16]
    assert {line["rollout/rounds"] for line in plain} == {1}
    assert all(line["rollout/responses"] == 16 * line["rollout/rounds"] for line in lines)
    assert any(line["rollout/rounds"] > 1 for line in lines)
    for line in lines:
        assert line["ssb/trained_effective_fraction"] == 1.0
        assert line["rollout/responses_filtered"] >= 16 * (line["rollout/rounds"] - 1)
        effective = line["ssb/fresh_effective_fraction"] * line["rollout/responses"]
        assert line["rollout/rounds"] == 3 or effective >= 16


def test_dynamic_sampling_ends_where_the_data_does(run: Run, capsys) -> None:
    settings = ("train.steps=3", "train.prompts_per_step=6", "buffer.capacity=0", "reward.claim_pattern=")
    lines = read_metrics(run(*settings, "train.parts=[language]", "algorithm.dynamic_sampling_rounds=9"))
    # 16 prompts are two rounds of 6.
    assert max(line["rollout/rounds"] for line in lines) == 2
    assert all(line["rollout/responses"] == 24 * line["rollout/rounds"] for line in lines)
    said = [line for line in capsys.readouterr().err.splitlines() if "no prompts for a further round" in line]
    assert len(said) == 1
    assert "(16 samples in data.train): the step trains on the" in said[0]
    assert "effective groups of train.prompts_per_step=6" in said[0]


def test_dynamic_sampling_on_a_mixture_ends_where_a_share_does(run: Run, tmp_path: Path, capsys) -> None:
    """Compare with 16 and 5 prompts in equal shares: 10 are one round of 6, and a second would lack the second set."""
    write_data(tmp_path / "few", images=5, texts=0, seed=3)
    write_data(tmp_path / "many", images=16, texts=0)
    mixture = f"data.train=[{{path: {tmp_path / 'many'}}}, {{path: {tmp_path / 'few'}}}]"
    settings = ("train.steps=3", "train.prompts_per_step=6", "buffer.capacity=0", "reward.claim_pattern=", mixture)
    lines = read_metrics(run(*settings, "algorithm.dynamic_sampling_rounds=9"))
    assert {line["rollout/rounds"] for line in lines} == {1}
    assert {line["data/share/few"] for line in lines} == {0.5}
    assert "(10 samples in the shares of data.train): the step trains on the" in capsys.readouterr().err


def test_text_only_prompts_train_with_the_language_model_only(run: Run) -> None:
    adapter = run("train.steps=3", "train.prompts_per_step=12", name="adapter")
    language = run("train.steps=3", "train.prompts_per_step=12", "train.parts=[language]", name="language")
    assert sum(line["data/text_only_left_out"] for line in read_metrics(adapter)) >= 4
    assert sum(line["data/text_only_left_out"] for line in read_metrics(language)) == 0
    modalities = {
        path: {sample["modality"] for sample in end(path)["replay-0.pt"]["samples"].values()}
        for path in (adapter, language)
    }
    assert modalities[adapter] == {"image"}
    assert modalities[language] == {"image", "text"}
    assert any("train/token_mult_prob_error_text" in line for line in read_metrics(language))
    assert not any("train/token_mult_prob_error_text" in line for line in read_metrics(adapter))
    # What the model generated in the first step is the same: only the update differs.
    assert read_metrics(adapter)[0]["reward/answer/mean"] == read_metrics(language)[0]["reward/answer/mean"]


@pytest.mark.usefixtures("all_rollouts")
def test_shuffled_rewards_teach_the_wrong_responses(run: Run) -> None:
    settings = ("train.steps=1", "reward.format_weight=0")
    plain, shuffled = (
        read_rollouts(run(*settings, f"reward.shuffle={value}", name=value)) for value in ("false", "true")
    )
    assert sorted(line["text"] for line in plain) == sorted(line["text"] for line in shuffled)
    assert {line["correct"] for line in plain if line["advantage"] > 0} == {True}
    assert {line["correct"] for line in plain if line["advantage"] < 0} == {False}
    rewarded = {line["correct"] for line in shuffled if line["advantage"] > 0}
    assert False in rewarded
    assert sum(line["correct"] for line in plain) == sum(line["correct"] for line in shuffled)


@pytest.mark.usefixtures("all_rollouts")
def test_every_rule_of_the_hybrid_reward_is_weighed_logged_and_shown(run: Run) -> None:
    rules = {"answer": 1.0, "format": 0.2, "consistency": 0.1, "steps": 0.1, "repetition": 0.1, "overlong": 0.1}
    weights = [f"reward.{name}_weight={weight}" for name, weight in rules.items()]
    folder = run("train.steps=1", *weights)
    [line] = read_metrics(folder)
    assert {f"reward/{name}/mean" for name in rules} == {name for name in line if name.startswith("reward/")}
    rollouts = read_rollouts(folder)
    assert {name for rollout in rollouts for name in rollout["rewards"]} == rules.keys()
    for rollout in rollouts:
        parts = rollout["rewards"]
        weighted = sum(rules[name] * value for name, value in parts.items())
        scale = sum(rules.values()) / sum(rules[name] for name in parts)
        assert rollout["total"] == pytest.approx(weighted * scale)
        assert 0 <= rollout["total"] <= 1.6 + 1e-9


def test_microbatches_and_recomputation_do_not_change_the_gradient(run: Run, one_step: Path) -> None:
    expected = gradients(one_step)
    assert {name.split(".")[0] for name, value in expected.items() if value.abs().max() > 0} == {
        "vision",
        "adapter",
        "language",
    }
    for override in (
        "train.tokens_per_microbatch=1",
        "train.tokens_per_microbatch=1024",
        "train.packing=first_fit_decreasing",
        "train.recompute=full",
    ):
        other = run("train.steps=1", ALL_PARTS, override, name=override)
        assert relative_difference(gradients(other), expected) < 1e-5, override
        assert read_metrics(other)[0]["actor/grad_norm"] == pytest.approx(read_metrics(one_step)[0]["actor/grad_norm"])


def test_a_prompt_is_computed_once_for_its_responses(run: Run) -> None:
    settings = ("train.steps=3", "train.tokens_per_microbatch=1024", "buffer.capacity=0")
    for updates in (1, 2):
        lines = read_metrics(run(*settings, f"train.updates_per_step={updates}", name=str(updates)))
        for line in lines:
            assert ("perf/log_probs_tokens" in line) == (updates > 1 and line["actor/updates"] > 1)
        trained = [line for line in lines if line["perf/update_tokens"]]
        assert trained
        for line in trained:
            # Prompts of 20 tokens and more, four short responses each.
            assert line["perf/update_tokens"] < 0.6 * line["perf/update_tokens_separate"]


def test_token_aggregation_weighs_long_responses_more(run: Run, one_step: Path) -> None:
    other = run("train.steps=1", ALL_PARTS, "loss.aggregation=token")
    assert relative_difference(gradients(other), gradients(one_step)) > 1e-3
    ours, theirs = read_metrics(other)[0], read_metrics(one_step)[0]
    assert ours["reward/answer/mean"] == theirs["reward/answer/mean"]


def test_importance_weights_are_one_where_engine_and_training_agree(run: Run, one_step: Path) -> None:
    loose = run("train.steps=1", ALL_PARTS, "algorithm.importance_cap=2", name="loose")
    assert relative_difference(gradients(loose), gradients(one_step)) < 1e-4
    tight = run("train.steps=1", ALL_PARTS, "algorithm.importance_cap=0.5", "train.clip_grad=0", name="tight")
    free = run("train.steps=1", ALL_PARTS, "train.clip_grad=0", name="free")
    halved = {name: value / 2 for name, value in gradients(free).items()}
    assert relative_difference(gradients(tight), halved) < 1e-4


def test_several_updates_share_the_rollouts_of_a_step(run: Run) -> None:
    folder = run("train.steps=2", "train.updates_per_step=2", "train.prompts_per_step=16", "train.learning_rate=0.02")
    state = end(folder)["state.pt"]
    assert (state["step"], state["version"], state["scheduler"]["num_steps"]) == (2, 4, 4)
    for line in read_metrics(folder):
        assert line["actor/updates"] == 2
        assert abs(line["actor/ppo_kl"]) > 1e-6  # the second update is off the policy that sampled


def test_kl_to_the_reference_is_taken_against_the_start_also_after_a_resume(run: Run, tmp_path: Path) -> None:
    settings = ("train.steps=4", "algorithm.kl_coefficient=0.5", "checkpoint.every_steps=2", "train.learning_rate=0.02")
    folder = run(*settings)
    lines = read_metrics(folder)
    assert lines[0]["actor/kl_loss"] == pytest.approx(0, abs=1e-9)
    assert min(line["actor/kl_loss"] for line in lines[1:]) > 1e-6
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "step-00000004")
    run(*settings, name="again")
    assert without_timings(read_metrics(again)) == without_timings(lines)
    assert differences(end(again), end(folder)) == []


def test_reaching_the_validation_goal_ends_the_stage_for_good(run: Run, root: Path) -> None:
    settings = (
        "train.steps=5",
        f"data.validation={root / 'data'}",
        "evaluation.every_steps=2",
        "evaluation.prompts=8",
        "evaluation.stop_at_pass_at_1=0.01",
    )
    folder = run(*settings)
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["validation/pass_at_1"] >= 0.01
    assert "validation/pass_at_1" not in lines[0]
    assert end(folder)["state.pt"]["finished"] is True
    run(*settings)
    assert read_metrics(folder) == lines


def test_a_run_stops_when_engine_and_training_disagree(run: Run) -> None:
    with pytest.raises(Exception, match="algorithm.max_log_prob_difference"):
        run("train.steps=1", "algorithm.max_log_prob_difference=1e-9")


@pytest.mark.usefixtures("all_rollouts")
def test_own_functions_train_without_answers(run: Run, root: Path, tmp_path: Path) -> None:
    samples = [replace(sample, answer="") for sample in read_shards(root / "data", parse_sample)]
    write_shards(samples, tmp_path / "data")
    own = tmp_path / "reward.py"
    own.write_text(
        "def digit(response, **_):\n"
        "    one, think = response.endswith('</think>\\\\boxed{1}'), response.startswith('</think>')\n"
        "    return {'one': float(one), 'think': float(think)}\n"
    )
    settings = (
        f"data.train={tmp_path / 'data'}",
        f"reward.functions=[{{path: {own}, name: digit}}]",
        "reward.format_weight=0",
        "buffer.target_effective_fraction=1",
        "train.steps=3",
        "train.learning_rate=0.01",
    )
    with pytest.raises(ValueError, match="has no answer, and buffer.effective_by=answer compares answers"):
        run(*settings, name="by-answer")
    folder = run(*settings, "buffer.effective_by=reward")
    lines = read_metrics(folder)
    names = {"reward/digit/mean", "reward/digit/one/mean", "reward/digit/think/mean", "reward/format/mean"}
    assert all({name for name in line if name.startswith("reward/")} == names for line in lines)
    assert all(line["ssb/fresh_effective_fraction"] > 0 for line in lines)
    assert any(line["ssb/replayed"] > 0 for line in lines)
    for rollout in read_rollouts(folder):
        parts = rollout["rewards"]
        assert parts["digit"] == (parts["digit/one"] + parts["digit/think"]) / 2
        # The answer has no part in it: its weight of 1 goes to the function's, which is 1 too.
        assert rollout["total"] == 2 * parts["digit"]
        assert (rollout["answer"], rollout["correct"]) == ("", False)
