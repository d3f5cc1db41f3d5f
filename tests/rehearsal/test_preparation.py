"""The step of a rehearsal: as many rows as every way through the code needs; a recipe with little changed."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1v2.checkpoint.hf.config import read_hf_architecture, read_hf_config
from megatron_r1v2.config.choices import Packing
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.data.shards import write_shards
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.planning.workload import RehearsedStep, Workload
from megatron_r1v2.rehearsal.preparation import (
    MADE,
    changed_settings,
    check_made_rows,
    plan_step,
    rehearsed_recipe,
    segments_of_response,
    write_rehearsal,
)
from megatron_r1v2.types import DataEndsRunError
from tests.planning.plans import ARCHITECTURE
from tests.rehearsal.test_own_rows import sample
from tests.rehearsal.tiny_rehearsal import RECIPES, tiny_model


def step_of(name, layout, *overrides):
    recipe = load_recipe(RECIPES / name, overrides)
    work = Workload.from_recipe(recipe, ARCHITECTURE)
    return recipe, plan_step(work, layout, segments=segments_of_response(recipe))


def test_every_slot_of_the_engine_is_filled_and_every_stage_has_a_microbatch():
    recipe, step = step_of("grpo.yaml", Layout(8, 1, 1, 0, True))
    responses = recipe.generation.responses_per_prompt
    assert step.prompts * responses == recipe.generation.max_requests
    assert step.mixed_groups == 1, "eight rows are more than two microbatches"
    assert (step.long, step.long_of_replica, step.prompts_of_replica) == (2, 2, 64)


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_each_update_of_a_step_has_groups_of_its_own(updates):
    recipe, step = step_of("grpo.yaml", Layout(8, 1, 1, 0, True), f"train.updates_per_step={updates}")
    assert step.mixed_groups == updates, "eight rows are more than two microbatches"
    assert step.long == max(2, updates)
    rows = RehearsedStep(step.long_of_replica, step.trained_rows(recipe.generation.responses_per_prompt), 1)
    work = replace(Workload.from_recipe(recipe, ARCHITECTURE), rehearsed=rows)
    once = replace(work, updates_per_step=1, rehearsed=replace(rows, rows=rows.rows // updates))
    assert work.microbatches(Layout()) == once.microbatches(Layout())


def test_more_replicas_have_more_rows():
    _, one = step_of("grpo_language.yaml", Layout(8, 2, 1, 28, True))
    _, two = step_of("grpo_language.yaml", Layout(8, 2, 2, 28, True))
    assert (two.long, two.short, two.mixed_groups) == (2 * one.long, 2 * one.short, 2 * one.mixed_groups)


def test_with_segments_a_group_of_each_replica_goes_on():
    recipe, step = step_of("grpo_64k.yaml", Layout(8, 1, 4, 0, True))
    assert segments_of_response(recipe) == 16
    assert (step.long, step.mixed_groups, step.whole_groups) == (8, 4, 4)
    assert step.prompts_of_replica == 16 * 8, "those of sixteen steps may be in flight"
    assert rehearsed_recipe(recipe, step, Path("folder"), Path("model")).generation.segment_tokens == 4096
    _, whole = step_of("grpo_64k.yaml", Layout(8, 1, 4, 0, True), "generation.segment_tokens=0")
    assert (whole.whole_groups, whole.prompts_of_replica) == (None, 8)


@pytest.mark.parametrize(
    ("tokens", "segments"), [(0, 1), (8192, 8), (8000, 9), (65536, 1)], ids=["none", "even", "uneven", "whole"]
)
def test_the_longest_response_takes_so_many_steps(tokens, segments):
    recipe = load_recipe(RECIPES / "grpo_64k.yaml", [f"generation.segment_tokens={tokens}", "buffer.max_age=9"])
    assert segments_of_response(recipe) == segments


@pytest.mark.parametrize(("name", "long"), [("align.yaml", 4), ("mpo.yaml", 2)])
def test_given_responses_fill_the_packed_rows_of_all_microbatches(name, long):
    _, step = step_of(name, Layout(8, 1, 1, 0, True))
    assert (step.long, step.short, step.mixed_groups) == (long, 0, 0)


def test_lengths_layout_and_parts_stay_as_they_are():
    recipe, step = step_of("grpo_fp8.yaml", Layout(8, 1, 1, 0, True), "train.skip_above_grad_norm=0.5")
    rehearsed = rehearsed_recipe(recipe, step, Path("folder"), Path("model"))
    assert rehearsed.parallel == recipe.parallel
    assert rehearsed.generation.max_response_tokens == recipe.generation.max_response_tokens
    assert rehearsed.train.tokens_per_microbatch == recipe.train.tokens_per_microbatch
    assert rehearsed.train.parts == recipe.train.parts
    assert (rehearsed.train.steps, rehearsed.checkpoint.every_steps, rehearsed.evaluation.every_steps) == (2, 2, 2)
    assert (rehearsed.model.layers.value, rehearsed.model.fp8.value) == ("local", "none")
    assert rehearsed.train.skip_above_grad_norm > 1, "the gradient norm of a fake is 1"
    assert rehearsed.model.hf_path == "model"


def test_every_changed_setting_is_told():
    recipe, step = step_of("grpo_fp8.yaml", Layout(8, 1, 1, 0, True))
    folder = Path("folder")
    told = changed_settings(recipe, rehearsed_recipe(recipe, step, folder, folder / "hf"), folder)
    assert f"train.prompts_per_step: 64 -> {step.prompts}" in told
    assert "model.layers: 'te' -> 'local'" in told
    assert "data.train: 'data/multimodal-math/train' -> made" in told
    assert "model.hf_path: 'checkpoints/r1v2-38b-hf' -> made" in told
    assert not any(each.startswith(("parallel.", "algorithm.clip")) for each in told)


def test_a_folder_that_was_given_is_not_called_made():
    recipe, step = step_of("grpo.yaml", Layout(8, 1, 1, 0, True))
    told = changed_settings(recipe, rehearsed_recipe(recipe, step, Path("folder"), Path("/mine")), Path("folder"))
    assert "model.hf_path: 'checkpoints/r1v2-38b-hf' -> '/mine'" in told


def test_all_image_prompts_of_pairs_are_continued_where_some_are():
    recipe, step = step_of("pairs.yaml", Layout(8, 1, 1, 0, True))
    assert 0 < recipe.pairs.dropout_ntp_fraction < 1
    assert rehearsed_recipe(recipe, step, Path("folder"), Path("model")).pairs.dropout_ntp_fraction == 1
    never = recipe.changed(pairs=recipe.pairs.changed(dropout_ntp_fraction=0.0))
    assert rehearsed_recipe(never, step, Path("folder"), Path("model")).pairs.dropout_ntp_fraction == 0


def test_log_probs_of_fakes_stay_out_of_the_folder_that_runs_share():
    recipe, step = step_of("mpo.yaml", Layout(8, 1, 1, 0, True))
    shared = recipe.changed(preference=recipe.preference.changed(reference_dir="shared"))
    assert rehearsed_recipe(shared, step, Path("folder"), Path("model")).preference.reference_dir == ""


@pytest.mark.parametrize(
    ("source", "weight", "checkpoint"),
    [
        ("reward_model.url=http://127.0.0.1:1/pooling", 0.0, ""),
        ("reward_model.checkpoint=nowhere", 0.5, MADE),
        ("reward_model.checkpoint=tests", 0.5, "tests"),
    ],
)
@pytest.mark.parametrize("name", ["grpo.yaml", "pairs.yaml"])
def test_a_reward_model_is_rehearsed_where_it_lies_beside_the_policy(monkeypatch, name, source, weight, checkpoint):
    monkeypatch.chdir(RECIPES.parents[1])
    recipe, step = step_of(name, Layout(8, 1, 1, 0, True), "reward.model_weight=0.5", source)
    rehearsed = rehearsed_recipe(recipe, step, Path("folder"), Path("model"))
    assert (rehearsed.reward.model_weight, rehearsed.reward_model.checkpoint) == (weight, checkpoint)


LIMITS = (
    *("data.max_prompt_tokens=120", "data.max_tiles=1", "generation.max_response_tokens=96"),
    "train.prompts_per_step=1",
)
NO_VALIDATION = ("data.validation=", "evaluation.every_steps=0")


def own_rehearsal(folder, model, *overrides, name="mpo.yaml"):
    config, _ = read_hf_config(model)
    architecture, _ = read_hf_architecture(model)
    recipe = load_recipe(RECIPES / name, [*LIMITS, *overrides])
    layout = Layout(1, 1, 1, 0, False)
    return write_rehearsal(recipe, config, architecture, layout, folder=folder, hf_path=model, own_data=True)


def test_every_data_set_of_a_mixture_is_measured(tmp_path):
    model = tiny_model(tmp_path / "model")
    write_shards([sample("short", 5), sample("long", 40)], tmp_path / "one")
    write_shards([sample("endless", 400)], tmp_path / "two")
    mixture = f"data.train=[{{path: {tmp_path / 'one'}}}, {{path: {tmp_path / 'two'}, weight: 2}}]"
    inputs = own_rehearsal(tmp_path / "made", model, mixture, *NO_VALIDATION, "data.too_long=skip")
    first, second, left_out = inputs.data
    assert f"{tmp_path / 'one'}: 2 rows; the longest prompt" in first
    assert f"{tmp_path / 'two'}: none of 1 rows can be trained on" in second
    assert "sample 'endless': the prompt has" in left_out


def test_rows_that_would_end_the_run_are_refused_before_anything_is_made(tmp_path):
    """Of all data sets at once."""
    model = tiny_model(tmp_path / "model")
    for weights in model.glob("*.safetensors"):
        weights.unlink()  # they would be made
    write_shards([sample("short", 5), sample("endless", 400)], tmp_path / "one")
    write_shards([sample("held-out", 300)], tmp_path / "two")
    with pytest.raises(DataEndsRunError) as refused:
        own_rehearsal(tmp_path / "made", model, f"data.train={tmp_path / 'one'}", f"data.validation={tmp_path / 'two'}")
    assert [line.partition(": ")[0] for line in str(refused.value).splitlines()] == [
        *(f"{tmp_path / 'one'}", "  shard-000000.tar", f"{tmp_path / 'two'}", "  shard-000000.tar")
    ]
    assert list((tmp_path / "made").iterdir()) == []


def test_too_few_rows_for_a_step_are_refused_before_anything_is_made(tmp_path):
    """As the stage refuses them before its first step: with those that are left out, and with segments in flight."""
    model = tiny_model(tmp_path / "model")
    write_shards([sample("a", 5), sample("b", 5), sample("c", 5), sample("endless", 400)], tmp_path / "rows")
    data = (f"data.train={tmp_path / 'rows'}", *NO_VALIDATION, "data.too_long=skip")
    with pytest.raises(DataEndsRunError, match=r"only 3 distinct prompts but train.prompts_per_step=4; lower"):
        own_rehearsal(tmp_path / "made", model, *data, "train.prompts_per_step=4")
    grpo = ("parallel.tensor=1", "parallel.sequence=false", "model.checkpoint=", "generation.segment_tokens=32")
    with pytest.raises(DataEndsRunError, match=r"4 prompts.* those of 3 steps can be in flight, 3 x .*_per_step=2"):
        own_rehearsal(tmp_path / "made", model, *data, *grpo, "train.prompts_per_step=2", name="grpo.yaml")
    mixture = f"data.train=[{{path: {tmp_path / 'rows'}}}, {{path: {tmp_path / 'rows'}, weight: 3}}]"
    with pytest.raises(DataEndsRunError, match=r"has 4 samples, but its share of train.prompts_per_step=6 is 4.5"):
        own_rehearsal(tmp_path / "made", model, mixture, *data[1:], "train.prompts_per_step=6")
    assert list((tmp_path / "made").iterdir()) == []


def test_weights_are_made_where_the_folder_has_none_and_that_is_known(tmp_path):
    model = tiny_model(tmp_path / "model")
    config, _ = read_hf_config(model)
    architecture, _ = read_hf_architecture(model)
    recipe = load_recipe(RECIPES / "mpo.yaml", LIMITS)

    def makes_weights(folder, hf_path):
        layout = Layout(1, 1, 1, 0, False)
        return write_rehearsal(recipe, config, architecture, layout, folder=folder, hf_path=hf_path).makes_weights

    assert not makes_weights(tmp_path / "own", model)
    (model / "model.safetensors").unlink()
    assert makes_weights(tmp_path / "config", model)


NEMO = "train.packing=nemo"


def test_nemo_is_rehearsed_by_our_packing_and_told():
    recipe, step = step_of("grpo.yaml", Layout(8, 1, 1, 0, True), NEMO)
    rehearsed = rehearsed_recipe(recipe, step, Path("folder"), Path("model"))
    assert "train.packing: 'nemo' -> 'first_fit_decreasing'" in changed_settings(recipe, rehearsed, Path("folder"))


@pytest.mark.parametrize(("name", "tokens"), [("grpo.yaml", 4096 + 8192), ("mpo.yaml", 2 * (4096 + 8192))])
def test_made_rows_that_nemo_cannot_pack_would_end_the_run(name, tokens):
    lengths = ("data.max_prompt_tokens=4096", "generation.max_response_tokens=8192")
    fits, ends = (
        load_recipe(RECIPES / name, [*lengths, NEMO, f"train.tokens_per_microbatch={capacity}"])
        for capacity in (tokens, tokens - 1)
    )
    check_made_rows(fits, 8192)
    with pytest.raises(DataEndsRunError, match=f"a sequence has {tokens} tokens, more than"):
        check_made_rows(ends, 8192)
    check_made_rows(ends.changed(train=ends.train.changed(packing=Packing.shared)), 8192)
