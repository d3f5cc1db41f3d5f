"""The command line of `prepare`: shards or a list of all bad rows, and nothing left behind by an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_r1v2.data.command import main
from megatron_r1v2.data.shards import check_shards
from tests.data.test_rows import BAD_ROWS, MMPR, OWN, VERL, write_rows


@pytest.mark.parametrize(("message", "row"), BAD_ROWS.items(), ids=BAD_ROWS.keys())
def test_a_bad_row_is_named_by_its_line_and_nothing_is_left(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], message: str, row: Any
) -> None:
    path = write_rows(tmp_path, {**OWN, "key": "first"}, row, OWN)
    before = sorted(tmp_path.iterdir())
    assert main([str(path), "--images", str(images), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"{path}, line 2: " in error
    assert message in error
    assert sorted(tmp_path.iterdir()) == before


def test_check_only_lists_every_bad_row(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path, OWN, "{", OWN, {**OWN, "answer": 1})
    before = sorted(tmp_path.iterdir())
    assert main([str(path), "--images", str(images), "--check-only"]) == 1
    captured = capsys.readouterr()
    assert "line 2" in captured.err
    assert "line 4" in captured.err
    assert "2 samples are fine, 2 are not" in captured.out
    assert sorted(tmp_path.iterdir()) == before
    assert main([str(write_rows(tmp_path, OWN)), "--images", str(images), "--check-only"]) == 0


@pytest.mark.parametrize(
    ("name", "message"), [("rows.parquet", "parquet is not supported yet"), ("no.jsonl", "does not exist")]
)
def test_inputs_that_cannot_be_read(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    assert main([str(tmp_path / name), "--images", str(images), "--output", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


def test_the_command_writes_shards(tmp_path: Path, images: Path) -> None:
    command = [sys.executable, "-m", "megatron_r1v2", "prepare"]
    root = Path(__file__).parents[2]
    path = write_rows(tmp_path, OWN, MMPR, VERL)
    arguments = [str(path), "--images", str(images), "--output", str(tmp_path / "out"), "--samples-per-shard", "2"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=root, check=True)
    assert "3 samples are fine" in done.stdout
    assert check_shards(tmp_path / "out") == {"shard-000000.tar": 2, "shard-000001.tar": 1}


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "python -m megatron_r1v2 prepare questions.jsonl --images pictures" in text
    assert "reward_model" in text
