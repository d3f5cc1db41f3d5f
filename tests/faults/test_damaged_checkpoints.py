"""A damaged checkpoint is noticed and the one before used; a full disk leaves the old ones as they were."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_r1v2.checkpoint.megatron.run_folder import finished_checkpoints
from tests.stages.runs import assert_same_end, recipe_for, run_stage

STEPS = 3
SETTINGS = (f"train.steps={STEPS}", "buffer.target_effective_fraction=0.95")


@pytest.fixture(scope="module")
def reference(root: Path, tmp_path_factory) -> Path:
    return run_stage(recipe_for(root, tmp_path_factory.mktemp("reference") / "run", SETTINGS))


@pytest.fixture
def run(reference: Path, tmp_path: Path) -> Path:
    shutil.copytree(reference, tmp_path / "run")
    return tmp_path / "run"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit in the tensors": (
        lambda folder: flip(folder / "tensors" / "__0_0.distcp"),
        "__0_0.distcp has other content",
    ),
    "a state cut short": (lambda folder: os.truncate(folder / "state.pt", 100), "state.pt has 100 bytes instead of"),
    "a missing file": (lambda folder: (folder / "replay-0.pt").unlink(), "replay-0.pt is missing"),
    "no manifest": (
        lambda folder: (folder / "checkpoint_manifest.json").unlink(),
        "checkpoint_manifest.json is not readable",
    ),
    "a manifest cut short": (
        lambda folder: os.truncate(folder / "checkpoint_manifest.json", 50),
        "checkpoint_manifest.json is not readable",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_used(
    root: Path, run: Path, reference: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage, told = DAMAGES[name]
    newest = finished_checkpoints(run / "checkpoints")[-1]
    damage(newest)
    with caplog.at_level(logging.WARNING):
        run_stage(recipe_for(root, run, SETTINGS))
    assert told in caplog.text
    assert "going on from step-00000002" in caplog.text
    assert newest.with_name(newest.name + ".damaged").is_dir()
    assert_same_end(run, reference)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_nothing(root: Path, run: Path) -> None:
    for folder in finished_checkpoints(run / "checkpoints"):
        flip(folder / "state.pt")
    with pytest.raises(RuntimeError, match=r"every checkpoint in .* is damaged \(step-00000003: state.pt has other"):
        run_stage(recipe_for(root, run, SETTINGS))
    assert len(finished_checkpoints(run / "checkpoints")) == STEPS


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk that has room for one checkpoint and a part of the next where a run writes them."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a disk of one's own needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_ends_the_run_with_the_old_checkpoint_intact(
    root: Path, small_disk: Path, reference: Path, asynchronous: str
) -> None:
    run = small_disk.parent
    settings = (*SETTINGS, f"checkpoint.asynchronous={asynchronous}")
    with pytest.raises(RuntimeError, match=r"could not be written to .*make room"):
        run_stage(recipe_for(root, run, settings))
    assert [path.name for path in finished_checkpoints(small_disk)] == ["step-00000001"]
    subprocess.run(["mount", "-o", "remount,size=20000k", str(small_disk)], check=True)
    run_stage(recipe_for(root, run, settings))
    assert_same_end(run, reference)
