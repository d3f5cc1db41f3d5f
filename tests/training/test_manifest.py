"""The manifest of a checkpoint: whatever happens to it or to a file is told, and never ends in a crash of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_r1v2.checkpoint.manifest import MANIFEST
from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.parallel import groups
from megatron_r1v2.training.manifest import check_manifest, write_run_manifest
from tests.ranks import run_ranks


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    groups.initialize(ParallelConfig(), seed=1)
    yield
    groups.shut_down()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make(tmp_path / "step-00000001")


def make(folder: Path) -> Path:
    (folder / "tensors").mkdir(parents=True)
    (folder / "tensors" / "__0_0.distcp").write_bytes(bytes(range(100)))
    (folder / "state.pt").write_bytes(b"state")
    (folder / "empty").touch()
    write_run_manifest(folder)
    return folder


def test_what_was_written_is_undamaged(checkpoint: Path) -> None:
    assert check_manifest(checkpoint) is None


def test_every_flipped_bit_of_every_file_is_told(checkpoint: Path) -> None:
    """The manifest too: its numbers, its names, its braces."""
    for path in (checkpoint / "tensors" / "__0_0.distcp", checkpoint / MANIFEST):
        whole = path.read_bytes()
        for place in range(8 * len(whole)):
            spoiled = bytearray(whole)
            spoiled[place // 8] ^= 1 << place % 8
            path.write_bytes(spoiled)
            assert check_manifest(checkpoint) is not None, f"{path.name}, bit {place}"
        path.write_bytes(whole)
    assert check_manifest(checkpoint) is None


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"files": []}', '{"files": {"state.pt": 5}}', "\x00" * 9])
def test_a_manifest_that_says_something_else_is_told(checkpoint: Path, text: str) -> None:
    (checkpoint / MANIFEST).write_text(text)
    assert str(check_manifest(checkpoint)).startswith("checkpoint_manifest.json is not readable (")


def test_a_file_that_the_disk_does_not_give_back_is_told(checkpoint: Path) -> None:
    """A real input/output error: the first page of a process is not there to be read."""
    (checkpoint / "empty").unlink()
    (checkpoint / "empty").symlink_to("/proc/self/mem")
    assert str(check_manifest(checkpoint)).startswith("empty cannot be read (")


def damage_of_each_rank(folder: str) -> str | None:
    groups.initialize(ParallelConfig(), seed=1)
    return check_manifest(Path(folder))


def test_all_ranks_hear_of_what_one_of_them_finds(checkpoint: Path) -> None:
    (checkpoint / "tensors" / "__0_0.distcp").unlink()
    assert run_ranks(2, damage_of_each_rank, str(checkpoint)) == ["tensors/__0_0.distcp is missing"] * 2


def test_a_checkpoint_of_an_earlier_version_is_refused_and_not_put_aside(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()
    (checkpoint / "manifest.json").write_text('{"files": {"state.pt": [5, 1]}}')
    with pytest.raises(ValueError, match="earlier development version .* train again"):
        check_manifest(checkpoint)
