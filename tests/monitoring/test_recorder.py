"""The files of a run: lines that survive a kill, and services that are on only when they are asked for."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from base64 import b64encode
from datetime import datetime
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from megatron_r1v2 import __version__
from megatron_r1v2.config.choices import Tracker
from megatron_r1v2.config.schema import LoggingConfig
from megatron_r1v2.monitoring.recorder import Recorder, RunInfo
from tests.stages.runs import read_metrics, read_rollouts

SHOWN = ("critic/rewards/mean", "reward/answer/mean", "actor/loss")


def recorder(folder: Path, *, first_step: int = 0, is_main: bool = True, **settings) -> Recorder:
    return Recorder(
        folder,
        RunInfo("tiny", "grpo", total_steps=5, first_step=first_step, shown=SHOWN, num_processes=4, device="H100"),
        settings=LoggingConfig(**settings),
        is_main=is_main,
    )


def write(folder: Path, steps: range, *, first_step: int = 0, value: float = 1.0) -> None:
    with recorder(folder, first_step=first_step) as opened:
        for step in steps:
            opened.note({"actor/loss": value * step})
            opened.write_rollouts([{"step": step, "text": f"{value}"}])
            opened.end_step(step)


def test_each_step_is_a_line_with_its_numbers_and_times(tmp_path: Path, capsys) -> None:
    with recorder(tmp_path) as opened:
        for step in (1, 2):
            with opened.timed("update"):
                pass
            with opened.timed("update"):
                pass
            opened.note({"actor/loss": 0.5 * step})
            opened.end_step(step)
    lines = read_metrics(tmp_path)
    assert [(line["step"], line["actor/loss"]) for line in lines] == [(1, 0.5), (2, 1.0)]
    for line in lines:
        assert 0 <= line["timing_s/update"] <= line["timing_s/step"]
    shown = capsys.readouterr().err
    assert "step 2  loss 1" in shown


def test_the_console_tells_means_apart(tmp_path: Path, capsys) -> None:
    with recorder(tmp_path) as opened:
        opened.note({"critic/rewards/mean": 1.12, "reward/answer/mean": 0.758})
        opened.end_step(1)
    assert "step 1  reward 1.12  answer 0.758  " in capsys.readouterr().err


def test_a_log_says_how_long_the_rest_will_take(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    # By the steps after the first, which holds the time before it.
    now = iter([0.0, 100.0, 110.0, 130.0, 145.0, 165.0])
    monkeypatch.setattr("megatron_r1v2.monitoring.recorder.time", SimpleNamespace(perf_counter=lambda: next(now)))
    with recorder(tmp_path) as opened:
        for step in range(1, 6):
            opened.end_step(step)
    lines = [line.partition(" s") for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    steps = [(line[0].split()[-1], line[2]) for line in lines]
    assert steps == [
        ("100.00", ", about 0:06:40 to go"),
        ("10.00", ", about 0:00:30 to go"),
        ("20.00", ", about 0:00:30 to go"),
        ("15.00", ", about 0:00:15 to go"),
        ("20.00", ""),
    ]


def test_a_task_before_the_steps_is_told_of_now_and_then(tmp_path: Path, capsys) -> None:
    with recorder(tmp_path) as opened, opened.progress("reference log-probs", 100) as show:
        for done in range(1, 101):
            show(done)
    lines = [line for line in capsys.readouterr().err.splitlines() if "reference" in line]
    assert lines == ["reference log-probs: 1 of 100", "reference log-probs: 100 of 100"]


def test_the_phase_is_the_newest_that_began(tmp_path: Path) -> None:
    opened = recorder(tmp_path, first_step=3, is_main=False)
    assert opened.current_phase() == "step 4, setup"
    with opened.timed("generate"):
        assert opened.current_phase() == "step 4, generate"
    opened.end_step(4)
    assert opened.current_phase() == "step 5, generate"


def test_numbers_of_a_step_do_not_leak_into_the_next(tmp_path: Path) -> None:
    with recorder(tmp_path) as opened:
        opened.note({"validation/pass_at_1": 0.5})
        opened.end_step(1)
        opened.end_step(2)
    assert "validation/pass_at_1" not in read_metrics(tmp_path)[1]


def test_lines_that_will_be_written_again_are_cut_off(tmp_path: Path) -> None:
    write(tmp_path, range(1, 5))
    for file in ("metrics.jsonl", "rollouts.jsonl"):
        with (tmp_path / file).open("a") as stream:
            stream.write('{"step": 5, "actor/lo')  # killed in the middle of a line
    write(tmp_path, range(3, 6), first_step=2, value=10.0)
    assert [line["actor/loss"] for line in read_metrics(tmp_path)] == [1.0, 2.0, 30.0, 40.0, 50.0]
    assert [line["text"] for line in read_rollouts(tmp_path)] == ["1.0", "1.0", "10.0", "10.0", "10.0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "rollouts.jsonl", "starts.jsonl"]


def test_what_was_done_in_another_way_is_kept_beside(tmp_path: Path, capsys) -> None:
    write(tmp_path, range(1, 5))
    info = RunInfo("tiny", "grpo", 5, first_step=2, shown=SHOWN, goes_back=True)
    with Recorder(tmp_path, info, settings=LoggingConfig(), is_main=True):
        pass
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl.left").read_text().splitlines()]
    assert [line["actor/loss"] for line in kept] == [3.0, 4.0]
    assert "metrics.jsonl had 2 lines of steps after 2, done before in another way; now in" in capsys.readouterr().err
    # A run that starts from nothing in a folder with curves: its checkpoints may have been moved away.
    write(tmp_path, range(1, 2), value=10.0)
    assert [line["actor/loss"] for line in read_metrics(tmp_path)] == [10.0]
    assert len((tmp_path / "rollouts.jsonl.left").read_text().splitlines()) == 2


@pytest.mark.parametrize("damaged", [b"\0" * 40, b'{"step": 2, "actor/lo', b'{"actor/loss": 2.0}', b"7", b"\xff"])
def test_a_line_that_cannot_be_read_is_said(tmp_path: Path, capsys, damaged: bytes) -> None:
    write(tmp_path, range(1, 4))
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([lines[0], damaged, lines[2]]) + b"\n")
    capsys.readouterr()
    write(tmp_path, range(4, 5), first_step=3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3, 4]
    assert "metrics.jsonl: 1 lines cannot be read and are left out" in capsys.readouterr().err


def test_changes_of_a_resume_that_left_no_checkpoint_are_those_of_the_last_one(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3))
    for change in ("generation.temperature: 1.0 -> 0.7", "generation.temperature: 1.0 -> 0.8"):
        with recorder(tmp_path, first_step=2) as opened:
            opened.note_changes([change])
    with recorder(tmp_path, first_step=4):
        pass
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert lines[2]["settings_changed"] == ["generation.temperature: 1.0 -> 0.8"]


def test_each_start_is_noted_with_its_machine(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3))
    write(tmp_path, range(3, 4), first_step=2)
    lines = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [line["steps_done"] for line in lines] == [0, 2]
    for line in lines:
        assert (line["stage"], line["version"], line["host"]) == ("grpo", __version__, platform.node())
        assert (line["processes"], line["device"]) == (4, "H100")
        datetime.fromisoformat(line["time"])
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=False)
    assert lines[0]["commit"].removesuffix("-dirty") == commit.stdout.strip()


def test_only_the_main_rank_writes(tmp_path: Path, capsys) -> None:
    with recorder(tmp_path, is_main=False) as opened:
        opened.note({"actor/loss": 1.0})
        opened.write_rollouts([{"step": 1}])
        opened.log("hello")
        opened.end_step(1)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_what_is_said_is_one_line_of_a_log_as_it_is(tmp_path: Path, capsys) -> None:
    message = f"train.parts=[adapter, language]: {'checkpoints/' * 20} [/x] and the rest"
    with recorder(tmp_path) as opened:
        opened.log(message)
    assert message in capsys.readouterr().err.splitlines()


def test_time_counts_also_when_the_block_fails(tmp_path: Path) -> None:
    opened = recorder(tmp_path, is_main=False)
    with pytest.raises(KeyError), opened.timed("reward"):
        raise KeyError("x")
    assert "timing_s/reward" in opened.values


def test_tensorboard_events_are_written_when_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with recorder(tmp_path, trackers=(Tracker.tensorboard,)) as opened:
        for step in (1, 2, 3):
            opened.note({"actor/loss": 1.0 * step})
            opened.end_step(step)
    # Resumed from a checkpoint of step 1: the others are written again, and shown once.
    with recorder(tmp_path, first_step=1, trackers=(Tracker.tensorboard,)) as opened:
        opened.note({"actor/loss": 20.0})
        opened.end_step(2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("actor/loss")] == [(1, 1.0), (2, 20.0)]


def test_wandb_keeps_its_id_over_a_resume(tmp_path: Path, monkeypatch) -> None:
    for name, value in (("WANDB_SILENT", "true"), ("WANDB_CONFIG_DIR", str(tmp_path / "config"))):
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    ids = []
    for first_step in (0, 1):
        with recorder(run, first_step=first_step, trackers=(Tracker.wandb_offline,)) as opened:
            opened.note({"actor/loss": 1.0})
            opened.end_step(first_step + 1)
        ids.append((run / "wandb_id").read_text())
    assert ids[0] == ids[1]
    assert len(list((run / "wandb").glob(f"offline-run-*-{ids[0]}"))) >= 1


def test_wandb_has_another_run_for_a_copy_of_the_folder_and_for_steps_that_are_done_anew(
    tmp_path: Path, monkeypatch
) -> None:
    """Two folders with one id would draw one curve, and wandb takes no step that it has had."""
    started: list[str] = []
    service = SimpleNamespace(finish=lambda **_: None)
    monkeypatch.setattr("wandb.init", lambda **options: (started.append(options["id"]), service)[1])

    def start(folder: Path, *, goes_back: bool = False) -> str:
        info = RunInfo("tiny", "grpo", 5, 2, SHOWN, goes_back=goes_back)
        with Recorder(folder, info, settings=LoggingConfig(trackers=(Tracker.wandb,)), is_main=True):
            return started[-1]

    first = start(tmp_path / "run")
    assert start((tmp_path / "run").rename(tmp_path / "moved")) == first
    shutil.copytree(tmp_path / "moved", tmp_path / "copy")
    of_copy = start(tmp_path / "copy")
    assert of_copy not in (first, start(tmp_path / "moved"))
    assert start(tmp_path / "copy") == of_copy
    assert start(tmp_path / "moved") == first
    assert start(tmp_path / "moved", goes_back=True) not in (first, of_copy)


def test_wandb_gets_the_settings_and_the_stage(tmp_path: Path, monkeypatch) -> None:
    started: dict[str, object] = {}
    monkeypatch.setattr("wandb.init", lambda **options: started.update(options))
    info = RunInfo("tiny", "grpo", 5, 0, SHOWN, {"train": {"steps": 5}})
    with Recorder(tmp_path, info, settings=LoggingConfig(trackers=(Tracker.wandb,)), is_main=True):
        pass
    assert (started["name"], started["job_type"], started["config"]) == ("tiny", "grpo", {"train": {"steps": 5}})
    # None: wandb reads its own variables.
    assert (started["entity"], started["group"], started["tags"]) == (None, None, None)
    settings = LoggingConfig(
        trackers=(Tracker.wandb,), wandb_project="p", wandb_entity="e", wandb_group="g", wandb_tags=("a", "b")
    )
    with Recorder(tmp_path, info, settings=settings, is_main=True):
        pass
    given = ("p", "e", "g", ("a", "b"))
    assert (started["project"], started["entity"], started["group"], started["tags"]) == given


def rollout(text: str, **values: object) -> dict[str, object]:
    return {"step": 1, "prompt_key": "k", "question": "q", "answer": "8", "text": text, **values}


def test_wandb_gets_a_table_of_rollouts_with_their_pictures_every_ten_steps(tmp_path: Path, monkeypatch) -> None:
    logged: list[tuple[dict, int]] = []
    service = SimpleNamespace(log=lambda values, step: logged.append((values, step)), finish=lambda **_: None)
    monkeypatch.setattr("wandb.init", lambda **_: service)
    picture = BytesIO()
    Image.new("RGB", (4, 3), "red").save(picture, "PNG")
    rows = [
        rollout("right", rewards={"answer": 1.0}, total=1.2, image_png=b64encode(picture.getvalue()).decode()),
        rollout("wrong", rewards={"answer": 0.0, "format": 1.0}, total=0.2, image_png=None),
    ]
    with recorder(tmp_path, trackers=(Tracker.wandb,)) as opened:
        for step in range(1, 12):
            opened.write_rollouts(rows)
            opened.end_step(step)
    tables = [(values["rollouts"], step) for values, step in logged if "rollouts" in values]
    assert [step for _, step in tables] == [1, 11]
    table = tables[0][0]
    (image, *first), (nothing, *second) = table.data
    assert (image.image.size, nothing) == ((4, 3), None)
    column = [name for name in table.columns if name != "image"].index
    assert (first[column("text")], first[column("reward/answer")], first[column("reward/format")]) == (
        "right",
        1.0,
        None,
    )
    assert (second[column("total")], second[column("reward/format")]) == (0.2, 1.0)


def test_each_phase_begins_and_ends_for_the_meter_of_memory_too(tmp_path: Path) -> None:
    heard: list[str] = []
    memory = SimpleNamespace(begin=lambda: heard.append("begin"), end=heard.append)
    info = RunInfo("tiny", "grpo", 5, 0, SHOWN)
    opened = Recorder(tmp_path, info, settings=LoggingConfig(), is_main=False, memory=memory)
    with pytest.raises(KeyError), opened.timed("update"):
        raise KeyError
    assert heard == ["begin", "update"]
