"""A run that is killed and started again ends with the bits of the run that was not."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path

import pytest
import torch

from megatron_r1v2.checkpoint.megatron.run_folder import finished_checkpoints
from megatron_r1v2.config.choices import OnResume, Part, StageName
from megatron_r1v2.config.load import recipe_yaml
from megatron_r1v2.config.recipes import AlignRecipe, GrpoRecipe, MpoRecipe, RewardModelRecipe
from megatron_r1v2.config.schema import RunConfig
from megatron_r1v2.data.samples import parse_sample
from megatron_r1v2.data.shards import write_shards
from megatron_r1v2.data.stream import read_shards
from megatron_r1v2.resilience.files import partial_path
from megatron_r1v2.resilience.fingerprint import Change
from megatron_r1v2.stages.resume import SettingChange, check_settings, compare_settings
from tests.stages.runs import (
    Ranks,
    assert_close,
    assert_same_end,
    checkpoint_contents,
    differences,
    has_line,
    last_checkpoint,
    read_metrics,
    read_rollouts,
    recipe_for,
    run_stage,
    take,
    without_timings,
)

STEPS = 6
# Few samples are fresh and effective, and nothing but a good buffer fills the rest; warm-up and decay move the rate.
SETTINGS = (
    f"train.steps={STEPS}",
    "checkpoint.every_steps=2",
    "buffer.target_effective_fraction=0.95",
    "train.warmup_steps=2",
    "train.weight_decay=0.1",
)
# Smaller batches round in another way, in bf16 enough to draw other tokens: a step is generated anew as a whole.
BF16 = (
    "model.precision=bf16",
    "checkpoint.asynchronous=true",
    "checkpoint.keep_rollouts=false",
    "algorithm.max_log_prob_difference=2",
)
ONE_RANK = (*SETTINGS, *BF16)


def assert_is_worth_comparing(run: Path) -> None:
    """Check that the weights moved, and that replayed samples took part before and after the kills."""
    metrics = read_metrics(run)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert metrics[2]["ssb/replayed"] > 0
    assert metrics[-1]["ssb/replayed"] > 0
    first, last = (checkpoint_contents(path)["tensors"] for path in sorted((run / "checkpoints").iterdir())[::2])
    name = "optimizer.state.exp_avg_sq.adapter.linear_fc1.weight"
    assert last[name].abs().max() > 0
    assert not torch.equal(first[name], last[name])


class Restarts:
    """Repeated starts of a run, with a check that each goes on from the newest checkpoint."""

    def __init__(self, recipe: GrpoRecipe, world_size: int) -> None:
        self.recipe = recipe
        self.world_size = world_size
        self.run = Path(recipe.run.output_dir)

    def kill_when(self, condition: Callable[[], bool]) -> None:
        newest = self.newest()
        ranks = Ranks(self.recipe, self.world_size)
        ranks.kill_when(condition)
        if newest:
            assert "step 1 " not in ranks.log.read_text()
        assert 0 < self.newest() < STEPS

    def finish(self) -> None:
        newest = self.newest()
        assert newest > 0
        assert f"step {newest} of {STEPS}" in Ranks(self.recipe, self.world_size).wait()

    def newest(self) -> int:
        finished = finished_checkpoints(self.run / "checkpoints")
        return int(finished[-1].name.removeprefix("step-")) if finished else 0


def kill_three_times(recipe: GrpoRecipe, world_size: int) -> None:
    """Kill after a step that no checkpoint holds, while a checkpoint is written, and in the middle of a step."""
    restarts = Restarts(recipe, world_size)
    run = restarts.run
    second, fourth, sixth = (run / "checkpoints" / f"step-{step:08d}" for step in (2, 4, 6))
    restarts.kill_when(lambda: second.is_dir() and has_line(run, "metrics.jsonl", 3))
    # Later checkpoints too: a slow machine may have been quicker to save than to kill.
    restarts.kill_when(lambda: any(partial_path(path).is_dir() for path in (fourth, sixth)))
    restarts.kill_when(fourth.is_dir)
    restarts.finish()


@pytest.fixture(scope="module")
def uninterrupted(root: Path, tmp_path_factory) -> Path:
    run = run_stage(recipe_for(root, tmp_path_factory.mktemp("uninterrupted") / "run", ONE_RANK))
    assert_is_worth_comparing(run)
    return run


def test_a_killed_run_ends_with_the_same_bits(root: Path, tmp_path: Path, uninterrupted: Path) -> None:
    recipe = recipe_for(root, tmp_path / "run", ONE_RANK)
    kill_three_times(recipe, 1)
    assert_same_end(tmp_path / "run", uninterrupted)


def test_killed_data_parallel_ranks_end_with_the_same_bits(root: Path, tmp_path: Path) -> None:
    Ranks(recipe_for(root, tmp_path / "reference", SETTINGS), 2).wait()
    assert_is_worth_comparing(tmp_path / "reference")
    kill_three_times(recipe_for(root, tmp_path / "run", SETTINGS), 2)
    assert_same_end(tmp_path / "run", tmp_path / "reference", rounded=True)


@pytest.mark.slow
def test_killed_tensor_parallel_ranks_end_with_the_same_bits(root: Path, tmp_path: Path) -> None:
    settings = (
        *SETTINGS,
        *BF16,
        "parallel.tensor=2",
        "parallel.sequence=true",
        "train.parts=[adapter, language]",
    )
    Ranks(recipe_for(root, tmp_path / "reference", settings), 2).wait()
    assert_is_worth_comparing(tmp_path / "reference")
    kill_three_times(recipe_for(root, tmp_path / "run", settings), 2)
    assert_same_end(tmp_path / "run", tmp_path / "reference")


def test_a_run_goes_on_at_another_layout(root: Path, tmp_path: Path) -> None:
    """Compare what one rank does from the start with two ranks: data-parallel, then tensor-, then pipeline-parallel."""
    reference = run_stage(recipe_for(root, tmp_path / "reference", SETTINGS))
    run = tmp_path / "run"
    Ranks(recipe_for(root, run, SETTINGS), 2).kill_when((run / "checkpoints" / "step-00000002").is_dir)
    tensor_parallel = Restarts(recipe_for(root, run, (*SETTINGS, "parallel.tensor=2")), 2)
    tensor_parallel.kill_when((run / "checkpoints" / "step-00000004").is_dir)
    pipeline_parallel = Restarts(recipe_for(root, run, (*SETTINGS, "parallel.pipeline=2")), 2)
    pipeline_parallel.finish()
    ours, theirs = read_rollouts(run), read_rollouts(reference)
    # After the two data-parallel ranks, of which the first one alone writes its rollouts.
    later = [[line for line in lines if line["step"] > 2] for lines in (ours, theirs)]
    for name in ("prompt_key", "text", "correct", "response_tokens"):
        assert [line[name] for line in later[0]] == [line[name] for line in later[1]], name
    our_lines, their_lines = without_timings(read_metrics(run)), without_timings(read_metrics(reference))
    for our_line, their_line in zip(our_lines, their_lines, strict=True):
        assert our_line == pytest.approx(their_line, rel=1e-3, abs=1e-5)
    ours, theirs = checkpoint_contents(last_checkpoint(run)), checkpoint_contents(last_checkpoint(reference))
    for name in ("buffer", "stream", "scheduler", "step", "version"):
        assert differences(ours["state.pt"][name], theirs["state.pt"][name]) == [], name
    for name in ("rollout_log_probs", "old_log_probs"):
        assert_close(take(ours["replay-0.pt"], name), take(theirs["replay-0.pt"], name))
    assert differences(ours["replay-0.pt"], theirs["replay-0.pt"]) == []
    for name, tensor in theirs["tensors"].items():
        torch.testing.assert_close(ours["tensors"][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_the_buffer_is_split_anew_over_more_ranks(root: Path, tmp_path: Path, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    for folder in finished_checkpoints(run / "checkpoints")[1:]:
        shutil.rmtree(folder)
    Ranks(recipe_for(root, run, ONE_RANK), 2).wait()
    before = checkpoint_contents(run / "checkpoints" / "step-00000002")["replay-0.pt"]["samples"]
    shards = [checkpoint_contents(last_checkpoint(run))[f"replay-{rank}.pt"]["samples"] for rank in (0, 1)]
    assert shards[0].keys().isdisjoint(shards[1])
    assert before.keys() <= shards[0].keys() | shards[1].keys()
    for name, sample in before.items():
        assert differences(sample, (shards[0] | shards[1])[name]) == []
    assert min(len(shard.keys() & before.keys()) for shard in shards) > 0


def test_a_run_that_is_asked_to_stop_saves_ends_well_and_goes_on(
    root: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    recipe = recipe_for(root, tmp_path / "run", (*ONE_RANK, "checkpoint.every_steps=0"))
    ranks = Ranks(recipe)
    ranks.send_when(signal.SIGUSR1, lambda: has_line(tmp_path / "run", "metrics.jsonl", 2))
    assert "asked to stop by SIGUSR1" in ranks.wait()
    restarts = Restarts(recipe, 1)
    assert 3 <= restarts.newest() < STEPS
    restarts.finish()
    assert_same_end(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=5", "train.steps was 6 when .* was saved and is 5 now"),
        ("train.learning_rate=0.5", "train.learning_rate was 0.001"),
        ("train.parts=[vision]", r"train.parts was \['adapter'\] when .* was saved and is \['vision'\] now"),
        ("run.seed=8", "run.seed was 7 when .* was saved and is 8 now"),
        (
            "generation.temperature=0.7",
            r"mean something else .*generation.temperature: 1.0 -> 0.7. .*checkpoint.accept_changes=true",
        ),
        ("model.precision=fp32", "model.precision was bf16 when .* was saved and is fp32 now"),
        ("evaluation.temperature=0", r"mean something else .*evaluation.temperature: 1.0 -> 0.0. "),
        ("data.too_long=skip", r"mean something else .*data.too_long: 'error' -> 'skip'. "),
        ("model.checkpoint={run}/checkpoints/step-00000002", r"began from other weights \(adapter\): .*hf_path="),
        ("checkpoint.resume_step=3", r"checkpoint.resume_step=3: .* has no checkpoint of that step; it has 2, 4, 6"),
    ],
)
def test_changes_that_a_checkpoint_cannot_follow_are_refused_and_nothing_is_lost(
    root: Path, tmp_path: Path, uninterrupted: Path, override: str, message: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    recipe = recipe_for(root, run, (*ONE_RANK, override.format(run=uninterrupted)))
    with pytest.raises(ValueError, match=message):
        run_stage(recipe)
    assert_same_end(run, uninterrupted)


def test_a_finished_run_does_nothing(
    root: Path, tmp_path: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    times = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
    run_stage(recipe_for(root, run, ONE_RANK))
    assert "all train.steps=6 steps are done: nothing is trained" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")} == times
    assert_same_end(run, uninterrupted)


def test_a_run_at_its_goal_goes_on_to_a_higher_one(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def align(*settings: str) -> list[dict[str, float]]:
        validation = (f"data.validation={root / 'data'}", "evaluation.every_steps=1")
        return read_metrics(run_stage(recipe_for(root, tmp_path / "run", (*validation, *settings), stage="align")))

    goal = "evaluation.stop_at_pass_at_1=0.001"
    assert len(align("train.steps=3", goal)) < 3
    told = "the run had reached evaluation.stop_at_pass_at_1: nothing is trained; it may be raised"
    assert told not in capsys.readouterr().err
    align("train.steps=3", goal)
    assert told in capsys.readouterr().err
    assert len(align("train.steps=3", "evaluation.stop_at_pass_at_1=1")) == 3


def changed_lines(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "settings_changed" in line]


def test_a_finished_run_goes_on_with_more_steps_and_other_settings_that_are_accepted(
    root: Path, tmp_path: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    more = ("train.steps=8", "reward.format_weight=0.5", "checkpoint.accept_changes=true", "checkpoint.keep_last=3")
    run_stage(recipe_for(root, run, (*ONE_RANK, *more)))
    metrics = read_metrics(run)
    assert [line["step"] for line in metrics] == list(range(1, 9))
    # The buffer's rewards were those of the settings before.
    assert (metrics[5]["ssb/replayed"] > 0, metrics[6]["ssb/replayed"]) == (True, 0)
    (noted,) = changed_lines(run)
    assert noted["step"] == STEPS
    assert noted["settings_changed"] == ["reward.format_weight: 0.2 -> 0.5", "train.steps: 6 -> 8"]
    assert (run / f"recipe-{STEPS}.yaml").read_bytes() == (uninterrupted / "recipe.yaml").read_bytes()
    # The cosine of eight steps, not of six: the rate of a step that six would have ended with is higher.
    rate = metrics[6]["actor/lr"]
    assert rate > metrics[5]["actor/lr"]
    told = f"follows the schedule of train.steps=8 from here on: {rate:.3g} in the next step, 0 at the end"
    assert told in capsys.readouterr().err


def test_a_run_goes_on_from_a_step_that_is_named(root: Path, tmp_path: Path, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    recipe = recipe_for(root, run, (*ONE_RANK, "checkpoint.resume_step=2"))
    run_stage(recipe)
    assert_same_end(run, uninterrupted)
    assert sorted(path.name for path in (run / "checkpoints").glob("*.left")) == [
        "step-00000004.left",
        "step-00000006.left",
    ]
    # A job that is queued again has the same command: it must not go back.
    times = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
    run_stage(recipe)
    assert {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")} == times


OWN_REWARD = "def own(response, **others):\n    return {}\n"


@pytest.mark.parametrize("changed", ["rows", "validation", "function", "template"])
def test_files_that_change_behind_the_settings_are_asked_for_and_noted(
    root: Path, tmp_path: Path, changed: str
) -> None:
    data, model = (shutil.copytree(root / name, tmp_path / name) for name in ("data", "model"))
    validation = shutil.copytree(data, tmp_path / "validation")
    own, run = tmp_path / "own.py", tmp_path / "run"
    own.write_text(OWN_REWARD.format("0.5"))
    settings = (
        f"data.train={data}",
        f"data.validation={validation}",
        f"model.hf_path={model}",
        f"reward.functions=[{{path: {own}, name: own}}]",
        "buffer.target_effective_fraction=0.95",
    )
    run_stage(recipe_for(root, run, (*settings, "train.steps=2")))
    if changed in ("rows", "validation"):  # one answer, with as many rows in shards of the same names
        folder = data if changed == "rows" else validation
        rows = list(read_shards(folder, parse_sample))
        shutil.rmtree(folder)
        write_shards([replace(rows[0], answer="1"), *rows[1:]], folder)
        told = rf"rows of data.{'train' if changed == 'rows' else changed}: '\w{{12}}' -> '\w{{12}}'"
    elif changed == "template":
        with (model / "chat_template.jinja").open("a") as file:
            file.write(" ")
        told = r"tokenizer and chat template of model.hf_path: '\w{12}' -> '\w{12}'"
    else:
        own.write_text(OWN_REWARD.format("0.25"))
        told = r"files of reward.functions: \['own \w{12}'\] -> \['own \w{12}'\]"
    with pytest.raises(ValueError, match=rf"files have changed since .*step-00000002 was saved, .*: {told}. Put them"):
        run_stage(recipe_for(root, run, (*settings, "train.steps=3")))
    run_stage(recipe_for(root, run, (*settings, "train.steps=3", "checkpoint.accept_changes=true")))
    (noted,) = changed_lines(run)
    assert any(re.fullmatch(told, line) for line in noted["settings_changed"])
    lines = read_metrics(run)
    assert (lines[1]["ssb/replayed"] > 0, lines[2]["ssb/replayed"]) == (True, 0)


def test_another_config_of_the_same_weights_is_refused(root: Path, tmp_path: Path) -> None:
    model, run = shutil.copytree(root / "model", tmp_path / "model"), tmp_path / "run"
    settings = (f"model.hf_path={model}", "train.steps=1")
    run_stage(recipe_for(root, run, settings, stage="align"))
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 123.0}
    (model / "config.json").write_text(json.dumps(config))
    told = rf"began from another model than .*{model}'?: language.rope_theta was [\d.]+ and is 123.0; put the files"
    with pytest.raises(ValueError, match=told):
        run_stage(recipe_for(root, run, (*settings, "train.steps=2"), stage="align"))


SETTINGS_OF_STAGES = [
    pytest.param(kind, section, setting, id=f"{kind.title()}-{section}.{setting}")
    for kind in (AlignRecipe, GrpoRecipe, MpoRecipe, RewardModelRecipe)
    for section, fields in kind.sections().items()
    for setting in fields.model_fields
]
OTHER_VALUES = {bool: lambda value: not value, int: lambda value: value + 1, float: lambda value: value + 0.5}


@pytest.mark.parametrize(("kind", "section", "setting"), SETTINGS_OF_STAGES)
def test_each_setting_that_changes_is_refused_asked_for_or_free(kind, section, setting) -> None:
    saved = kind()
    values = dict(getattr(saved, section))
    value = values[setting]
    if isinstance(value, Enum):
        values[setting] = next(each for each in type(value) if each is not value)
    elif isinstance(value, tuple):
        values[setting] = (Part.vision,) if setting == "parts" else ()
        saved = saved.model_copy(update={section: getattr(saved, section).model_copy(update={setting: (Part.score,)})})
    else:
        values[setting] = OTHER_VALUES.get(type(value), lambda value: "another")(value)
    fields = type(getattr(saved, section))
    now = saved.model_copy(update={section: fields.model_construct(**values)})
    (change,) = compare_settings(now, saved)
    assert change.change.setting.startswith(f"{section}.{setting}")
    assert change.rule is fields.resume_rule(setting)
    refused = {
        "run": {"stage", "seed"},
        "model": {"precision", "fp8_weights"},
        "train": {"parts", *SCHEDULE},
    }.get(section, set())
    assert change.is_refused == (setting in refused)


SCHEDULE = ("updates_per_step", "learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "adam_beta2")


def test_rules_by_example() -> None:
    rules = {
        OnResume.asked: "reward.answer_weight generation.temperature generation.responses_per_prompt buffer.capacity "
        "algorithm.clip_high data.max_prompt_tokens data.too_long train.prompts_per_step model.fp8 loss.aggregation "
        "evaluation.prompts evaluation.temperature evaluation.top_p",
        OnResume.free: "run.output_dir model.hf_path parallel.tensor logging.trackers checkpoint.keep_last "
        "generation.kv_cache_gib train.recompute evaluation.runs",
        # Its weights, and its reference, have other bits.
        OnResume.refused: "model.precision model.fp8_weights train.learning_rate",
        OnResume.larger: "train.steps",
    }
    for rule, names in rules.items():
        for section, setting in (name.split(".") for name in names.split()):
            assert GrpoRecipe.sections()[section].resume_rule(setting) is rule, setting
    moved = {
        name: SettingChange(Change(name, 1, 2), OnResume.asked).moves_validation
        for name in (
            "evaluation.top_p",
            "rows of data.validation",
            "data.max_tiles",
            "algorithm.clip_low",
            "buffer.max_age",
        )
    }
    assert list(moved.values()) == [True, True, True, False, False]
    grown, shrunk = (SettingChange(Change("train.steps", 6, new), OnResume.larger) for new in (7, 5))
    assert (grown.is_refused, shrunk.is_refused) == (False, True)


def test_the_folder_of_another_stage_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000003"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe_yaml(MpoRecipe(run=RunConfig(stage=StageName.mpo))))
    now = GrpoRecipe(run=RunConfig(stage=StageName.grpo, output_dir="runs/x"))
    told = (
        r"run.output_dir='runs/x' holds a run of the mpo stage \(step-00000003\), and this is grpo: .*model.checkpoint"
    )
    with pytest.raises(ValueError, match=told):
        check_settings(now, folder)
