"""A running stage: what its parts decide, when it saves, and in which order it writes."""

from __future__ import annotations

import errno
import io
import shutil
from contextlib import redirect_stderr, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1v2.checkpoint.megatron.run_folder import finished_checkpoints
from megatron_r1v2.config.schema import Part
from megatron_r1v2.data.samples import DataError, parse_sample
from megatron_r1v2.data.shards import write_shards
from megatron_r1v2.data.stream import PromptStream, read_shards
from megatron_r1v2.monitoring.recorder import Recorder
from megatron_r1v2.resilience import rank_watch
from megatron_r1v2.resilience.signals import StepAbandoned
from megatron_r1v2.rewards.replica import ScoringError
from megatron_r1v2.stages.align import supervised_step
from megatron_r1v2.stages.session import open_session
from megatron_r1v2.types import Prompt
from tests.ranks import run_ranks
from tests.stages.runs import (
    checkpoint_contents,
    differences,
    last_checkpoint,
    read_metrics,
    recipe_for,
    run_stage,
    without_timings,
)
from tests.stages.tiny_run import write_data


@pytest.mark.parametrize(
    ("parts", "text", "cached"),
    [("[adapter]", False, True), ("[language]", True, True), ("[vision]", False, False)],
)
def test_what_trains_decides_on_text_prompts_and_cached_features(
    root: Path, tmp_path: Path, parts: str, text: bool, cached: bool
) -> None:
    recipe = recipe_for(root, tmp_path / "run", (f"train.parts={parts}",))
    with open_session(recipe, stage="grpo", shown=()) as session:
        assert session.trains_text is text
        assert (session.policy.features is not None) is cached
        trained = {name.split(".")[0] for name, p in session.model.named_parameters() if p.requires_grad}
        assert trained == {Part(part).value for part in session.parts}


@pytest.mark.parametrize(
    ("every", "step", "last", "saved"),
    [(2, 4, False, True), (2, 3, False, False), (0, 4, False, False), (0, 3, True, True)],
)
def test_when_a_step_is_saved(root: Path, tmp_path: Path, every: int, step: int, last: bool, saved: bool) -> None:
    with open_session(recipe_for(root, tmp_path / "run"), stage="grpo", shown=()) as session:
        checkpoint = session.recipe.checkpoint.changed(every_steps=every)
        session.recipe = session.recipe.changed(checkpoint=checkpoint)
        session.step = step
        assert session.should_save(last=last) is saved


def test_a_checkpoint_has_its_name_after_the_numbers_of_its_step_are_written(root: Path, tmp_path: Path) -> None:
    """A run that dies between the two does the step again; the other way round its line would be missing for ever."""
    run = tmp_path / "run"
    with open_session(recipe_for(root, run), stage="align", shown=()) as session:
        supervised_step(session)
        session.save({}, {})
        in_the_way = run / "metrics.jsonl"
        in_the_way.mkdir()
        with pytest.raises(IsADirectoryError):
            session.end_step()
        assert finished_checkpoints(run / "checkpoints") == []
        in_the_way.rmdir()


def broken_copy(data: Path, folder: Path, first: int) -> Path:
    """Copy a data set, with no picture left from a sample on; the sizes in the tar file are unchanged."""
    shutil.copytree(data, folder)
    shard = folder / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    position = content.index(f"sample-{first:03d}.0.png".encode())
    while (position := content.find(b"\x89PNG\r\n\x1a\n", position)) >= 0:
        content[position : position + 30] = bytes(30)
    shard.write_bytes(content)
    return folder


def test_a_run_that_ends_by_an_error_is_saved_before_and_goes_on_when_it_is_mended(root: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "whole", images=40, texts=0)
    data = broken_copy(tmp_path / "whole", tmp_path / "data", 20)
    settings = ("train.steps=5", "checkpoint.every_steps=0", "data.shuffle=false", "train.prompts_per_step=6")

    def align(name: str, data: Path) -> Path:
        return run_stage(recipe_for(root, tmp_path / name, (*settings, f"data.train={data}"), stage="align"))

    with pytest.raises(DataError, match="20 of 40 samples read are corrupt"):
        align("run", data)
    (saved,) = finished_checkpoints(tmp_path / "run" / "checkpoints")
    assert saved.name == "step-00000003"
    shutil.copy(tmp_path / "whole" / "shard-000000.tar", data / "shard-000000.tar")
    assert [line["step"] for line in read_metrics(align("run", data))] == [1, 2, 3, 4, 5]
    ours, theirs = (
        checkpoint_contents(last_checkpoint(run))["tensors"] for run in (tmp_path / "run", align("whole-run", data))
    )
    assert differences(ours, theirs) == []


def test_a_step_whose_numbers_cannot_be_written_is_saved(root: Path, tmp_path: Path, monkeypatch) -> None:
    def end_step(recorder: Recorder, step: int) -> None:
        if step == 2:
            raise OSError(errno.EDQUOT, "Disk quota exceeded", "metrics.jsonl")

    monkeypatch.setattr(Recorder, "end_step", end_step)
    settings = ("train.steps=3", "checkpoint.every_steps=0")
    with pytest.raises(OSError, match="quota"):
        run_stage(recipe_for(root, tmp_path / "run", settings, stage="align"))
    (saved,) = finished_checkpoints(tmp_path / "run" / "checkpoints")
    assert saved.name == "step-00000002"


def _align_until_the_error(root: str, folder: str) -> str:
    settings = ("train.steps=5", "checkpoint.every_steps=0", "data.shuffle=false", f"data.train={folder}/data")
    try:
        run_stage(recipe_for(Path(root), Path(folder) / "run", settings, stage="align"))
    except DataError as error:
        return str(error)
    return ""


def test_all_ranks_save_before_an_error_of_the_data(root: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "whole", images=40, texts=0)
    broken_copy(tmp_path / "whole", tmp_path / "data", 20)
    errors = run_ranks(2, _align_until_the_error, str(root), str(tmp_path))
    assert len(errors) == 2
    assert all("samples read are corrupt" in error for error in errors)
    (saved,) = finished_checkpoints(tmp_path / "run" / "checkpoints")
    assert saved.name == "step-00000003"


def _score_until_the_error(root: str, folder: str) -> str:
    own = Path(folder) / "reward.py"
    settings = (
        "parallel.tensor=2",
        "train.steps=3",
        "train.prompts_per_step=2",
        "generation.responses_per_prompt=2",
        "checkpoint.every_steps=0",
        f"reward.functions=[{{path: {own}, name: fails_from_call_5}}]",
    )
    try:
        run_stage(recipe_for(Path(root), Path(folder) / "run", settings))
    except ScoringError as error:
        return str(error)
    return ""


def test_all_ranks_save_before_an_error_of_a_reward_function(root: Path, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(
        "def fails_from_call_5(**_):\n"
        f"    with open({str(tmp_path / 'calls')!r}, 'a') as calls:\n"
        "        calls.write('x')\n"
        "        assert calls.tell() <= 4\n"
        "    return 1\n"
    )
    errors = run_ranks(2, _score_until_the_error, str(root), str(tmp_path))
    assert len(errors) == 2
    assert all("fails_from_call_5 failed for every response" in error for error in errors)
    (saved,) = finished_checkpoints(tmp_path / "run" / "checkpoints")
    assert saved.name == "step-00000001"


def _fail_in_the_second_step(root: str, folder: str, alone: bool, error: Exception) -> tuple[bool, str]:
    rank_watch._GATHER_SECONDS = 1.0  # type: ignore[attr-defined]
    settings, printed = ("train.steps=3", "checkpoint.every_steps=0"), io.StringIO()
    with open_session(
        recipe_for(Path(root), Path(folder) / "run", settings, stage="align"), stage="align", shown=()
    ) as session:
        supervised_step(session)
        if not alone or session.context.is_main:
            with redirect_stderr(printed), suppress(type(error)), session.save_on_error(dict, dict):
                raise error
        return session.saved_step == 1, printed.getvalue()


@pytest.mark.parametrize("alone", [False, True])
def test_ranks_save_before_any_error_that_all_have(root: Path, tmp_path: Path, alone: bool) -> None:
    error = KeyError("a fault of the program")
    found = run_ranks(2, _fail_in_the_second_step, str(root), str(tmp_path), alone, error)
    assert [saved for saved, _ in found] == [not alone] * 2
    assert len(finished_checkpoints(tmp_path / "run" / "checkpoints")) == int(not alone)
    assert "where the ranks were:" in found[0][1]


@pytest.mark.parametrize("alone", [False, True])
def test_a_rank_that_is_missing_where_a_step_is_given_up_is_told_of(root: Path, tmp_path: Path, alone: bool) -> None:
    """SLURM ends the ranks of the other nodes when a node is lost: SIGTERM may come before any error does."""
    (saved, printed), _ = run_ranks(2, _fail_in_the_second_step, str(root), str(tmp_path), alone, StepAbandoned("it"))
    assert saved is not alone
    assert ("where the ranks were:" in printed) is alone
    assert ("rank 1: " in printed) is alone


def test_a_step_whose_update_was_made_is_not_saved_as_the_one_before(root: Path, tmp_path: Path) -> None:
    with open_session(recipe_for(root, tmp_path / "run"), stage="align", shown=()) as session:
        supervised_step(session)

        def fail(*, before: bool) -> None:
            with session.save_on_error(dict, dict):
                if not before:
                    session.policy.version += 1
                raise RuntimeError("out of memory")

        with pytest.raises(RuntimeError):
            fail(before=False)
        assert finished_checkpoints(tmp_path / "run" / "checkpoints") == []
        for _ in range(2):  # the second has nothing to add
            with pytest.raises(RuntimeError):
                fail(before=True)
        assert len(finished_checkpoints(tmp_path / "run" / "checkpoints")) == 1


def long_data(folder: Path, long: int, *, count: int = 16) -> Path:
    """Write samples of which the first so many have a long question."""
    write_data(folder / "plain", images=count, texts=0)
    samples = list(read_shards(folder / "plain", parse_sample))
    messages = ({"role": "user", "content": "<image>\n" + "abcdefgh" * 20},)
    write_shards([replace(s, messages=messages) if n < long else s for n, s in enumerate(samples)], folder / "data")
    return folder / "data"


def test_prompts_that_are_too_long_are_named_before_the_first_step_or_left_out(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = long_data(tmp_path, 2)
    settings = (f"data.train={data}", "data.max_prompt_tokens=100", "train.steps=2")
    for mode in ("error", "fewer_tiles"):
        with pytest.raises(ValueError, match=r"2 prompts of .*data are too long: sample-000, sample-001"):
            run_stage(recipe_for(root, tmp_path / "run", (*settings, f"data.too_long={mode}"), stage="align"))
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
    lines = read_metrics(
        run_stage(recipe_for(root, tmp_path / "run", (*settings, "data.too_long=skip"), stage="align"))
    )
    assert "2 prompts of" in (printed := capsys.readouterr().err)
    assert "are left out: sample-000, sample-001" in printed
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[-1]["data/too_long_left_out"] >= 0
    assert lines[-1]["data/corrupt_samples"] == 0


@pytest.mark.parametrize("stage", ["align", "grpo", "mpo"])
def test_a_sample_that_is_taken_out_does_not_forbid_to_go_on(
    root: Path, tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(root / "data", tmp_path / "data")
    recipe = recipe_for(root, tmp_path / "run", (f"data.train={data}", "train.steps=6"), stage=stage)
    read = PromptStream.next

    def run_until(samples: int) -> None:
        def read_some(self: PromptStream, count: int) -> list[Prompt]:
            if self.samples_read >= samples:
                raise DataError("a sample that must be taken out")
            return read(self, count)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PromptStream, "next", read_some)
            with pytest.raises(DataError, match="must be taken out"):
                run_stage(recipe)

    run_until(12)
    samples = list(read_shards(data, parse_sample))
    shutil.rmtree(data)
    write_shards(samples[:-1], data)
    run_until(24)
    assert "has 15 samples, and had 16 when the run was saved" in capsys.readouterr().err
    run_stage(recipe)  # and again, from a checkpoint that knows of it
    assert "when the run was saved" not in capsys.readouterr().err
    steps = [line["step"] for line in read_metrics(tmp_path / "run")]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_response_that_repeats_the_think_tag_is_trained_without_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = list(read_shards(root / "data", parse_sample))
    write_shards([replace(sample, response=f"<think>\n{sample.response}") for sample in samples], tmp_path / "twice")

    def align(data: Path, name: str) -> Path:
        settings = ("train.steps=2", f"data.train={data}")
        return run_stage(recipe_for(root, tmp_path / name, settings, stage="align"))

    plain, twice = align(root / "data", "plain"), align(tmp_path / "twice", "run")
    ours, theirs = (checkpoint_contents(last_checkpoint(run))["tensors"] for run in (twice, plain))
    assert differences(ours, theirs) == []
    assert "responses of 16 samples of" in (printed := capsys.readouterr().err)
    assert "begin with <think>, which the chat template gives already; it is taken off: sample-000" in printed


@pytest.mark.parametrize("stage", ["mpo", "reward_model"])
def test_pairs_that_never_stop_thinking_are_refused_unless_asked_for(root: Path, tmp_path: Path, stage: str) -> None:
    samples = list(read_shards(root / "data", parse_sample))
    rows = {asked: [replace(s, rejected="left 4, ", unclosed_think=asked) for s in samples] for asked in (False, True)}
    for asked, changed in rows.items():
        write_shards(changed, tmp_path / str(asked))

    def train(data: str) -> None:
        settings = ("train.steps=1", f"data.train={tmp_path / data}")
        run_stage(recipe_for(root, tmp_path / data / "run", settings, stage=stage))

    with pytest.raises(ValueError, match="16 pairs of .* never closes its <think> by </think>: sample-000"):
        train("False")
    train("True")


def mixture_settings(folder: Path) -> tuple[str, ...]:
    sets = (folder / "charts", folder / "more" / "plans")
    if not sets[0].exists():
        for seed, data in enumerate(sets):
            write_data(data, images=12, texts=0, seed=seed)
    # Each step of 6 has two prompts of the first and four of the second.
    return ("train.steps=4", f"data.train=[{{path: {sets[0]}}}, {{path: {sets[1]}, weight: 2}}]")


def _train_on_a_mixture(root: str, folder: str) -> list[dict[str, float]]:
    settings = mixture_settings(Path(folder))
    run = run_stage(recipe_for(Path(root), Path(folder) / "two", settings, stage="align"))
    return read_metrics(run)


def test_a_run_on_a_mixture_has_its_shares_and_depends_neither_on_replicas_nor_on_a_stop(
    root: Path, tmp_path: Path
) -> None:
    settings = mixture_settings(tmp_path)
    whole = run_stage(recipe_for(root, tmp_path / "whole", settings, stage="align"))
    lines = read_metrics(whole)
    assert [(line["data/share/charts"], line["data/share/plans"]) for line in lines] == [(1 / 3, 2 / 3)] * 4
    shutil.copytree(whole, tmp_path / "run")
    for step in (3, 4):  # killed after the second step
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    resumed = run_stage(recipe_for(root, tmp_path / "run", settings, stage="align"))
    assert differences(*(checkpoint_contents(last_checkpoint(run)) for run in (resumed, whole))) == []
    assert without_timings(read_metrics(resumed)) == without_timings(lines)
    of_two, _ = run_ranks(2, _train_on_a_mixture, str(root), str(tmp_path))
    for ours, theirs in zip(of_two, lines, strict=True):
        assert ours["data/samples_read"] == theirs["data/samples_read"]
        assert ours["actor/nll"] == pytest.approx(theirs["actor/nll"], rel=1e-4)


def test_grpo_shows_what_each_set_of_a_mixture_teaches(root: Path, tmp_path: Path) -> None:
    recipe = recipe_for(root, tmp_path / "run", (*mixture_settings(tmp_path), "train.steps=1"))
    (line,) = read_metrics(run_stage(recipe))
    fractions = [line[f"data/effective_fraction/{name}"] for name in ("charts", "plans")]
    assert (fractions[0] + 2 * fractions[1]) / 3 == pytest.approx(line["ssb/fresh_effective_fraction"])
    assert line["data/share/plans"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("setting", ["generation.segment_tokens=3", "algorithm.dynamic_sampling_rounds=2"])
def test_grpo_on_a_mixture_goes_on_with_what_each_set_teaches(root: Path, tmp_path: Path, setting: str) -> None:
    settings = (*mixture_settings(tmp_path), setting, "train.steps=4", "buffer.target_effective_fraction=0.95")
    whole = run_stage(recipe_for(root, tmp_path / "whole", settings))
    shutil.copytree(whole, tmp_path / "run")
    for step in (3, 4):  # killed after the second step
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    resumed = run_stage(recipe_for(root, tmp_path / "run", settings))
    assert differences(*(checkpoint_contents(last_checkpoint(run)) for run in (resumed, whole))) == []
    lines = read_metrics(whole)
    assert without_timings(read_metrics(resumed)) == without_timings(lines)
    if setting.startswith("generation"):  # groups of an earlier step: the restored prompts know their set
        assert any(line["rollout/groups_in_flight"] for line in lines)
    else:
        assert any(line["rollout/rounds"] == 2 for line in lines)
    for line in lines:
        shown = {name for name in line if name.startswith("data/share/")}
        taught = {name for name in line if name.startswith("data/effective_fraction/")}
        assert {name.rpartition("/")[2] for name in shown} == {name.rpartition("/")[2] for name in taught}
