from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_r1v2.data.command import main
from megatron_r1v2.data.prepare import read_samples
from megatron_r1v2.data.samples import SampleError
from megatron_r1v2.data.shards import check_shards
from tests.tiny import tiny_png

OWN = {
    "messages": [{"role": "user", "content": "<image>\nleft + right?"}],
    "answer": "8",
    "answer_type": "numeric",
    "images": ["a.png"],
    "facts": {"left": "3", "right": "5"},
}
MMPR = {"id": 3, "question": "What is shown?", "chosen": "A cat.", "rejected": "A dog.", "image": "a.png"}
VERL = {
    "data_source": "geometry",
    "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "<image>What is x?"}],
    "images": [{"path": "a.png"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": 42},
    "extra_info": {"index": 0},
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(tiny_png(1))
    Image.new("RGB", (20, 10), (9, 8, 7)).save(folder / "b.jpg")
    Image.new("P", (20, 10)).save(folder / "c.gif")
    (folder / "broken.png").write_bytes(tiny_png(1)[:-300])
    return folder


def write_rows(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "my rows.v2.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_our_own_rows(tmp_path: Path, images: Path) -> None:
    path = write_rows(tmp_path, OWN, "", {**OWN, "key": "k1", "images": ["b.jpg"], "response": "8</think>8"})
    first, second = read_samples(path, images)
    assert first.key == "my-rows-v2-00000001"
    assert first.images == {"0.png": tiny_png(1)}
    assert (first.answer, first.answer_type, first.facts) == ("8", "numeric", {"left": "3", "right": "5"})
    assert (second.key, second.response) == ("k1", "8</think>8")
    assert second.images == {"0.jpg": (images / "b.jpg").read_bytes()}


def test_mmpr_rows_become_preference_pairs(tmp_path: Path, images: Path) -> None:
    (sample,) = read_samples(write_rows(tmp_path, MMPR), images)
    assert sample.messages == ({"role": "user", "content": "<image>\nWhat is shown?"},)
    assert (sample.chosen, sample.rejected, sample.answer) == ("A cat.", "A dog.", "")
    assert list(sample.images) == ["0.png"]


def test_verl_rows_become_prompts(tmp_path: Path, images: Path) -> None:
    (sample,) = read_samples(write_rows(tmp_path, VERL), images, answer_type="numeric")
    assert sample.messages == tuple(VERL["prompt"])
    assert (sample.answer, sample.answer_type, sample.source) == ("42", "numeric", "geometry")


def test_other_image_formats_are_stored_as_png(tmp_path: Path, images: Path) -> None:
    (sample,) = read_samples(write_rows(tmp_path, {**OWN, "images": ["c.gif"]}), images)
    assert sample.images["0.png"].startswith(b"\x89PNG")


BAD_ROWS = {
    "not JSON": "{",
    "expected a JSON object": "[]",
    "unknown kind of row with fields text": {"text": "hello"},
    "unknown field 'anwser'": {**OWN, "anwser": "8"},
    "schema 3": {**OWN, "schema": 3},
    "answer_type is None": {name: value for name, value in OWN.items() if name != "answer_type"},
    "answer must be text": {**OWN, "answer": 8},
    "facts must be an object": {**OWN, "facts": []},
    "a list of messages": {**OWN, "messages": [{"role": "user", "content": None}]},
    "does not exist": {**OWN, "images": ["nowhere.png"]},
    "cannot be decoded": {**OWN, "images": ["broken.png"]},
    "an image must be a path": {**VERL, "images": [{"bytes": "iVBOR"}]},
    "no ground_truth": {**VERL, "reward_model": {"style": "rule"}},
    "1 <image> and there are 2 images": {**OWN, "images": ["a.png", "b.jpg"]},
    "chosen must be text": {**MMPR, "chosen": 3},
    "sample key 'a.b'": {**OWN, "key": "a.b"},
    "was used in line 1 already": {**OWN, "key": "first"},
}


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
    with pytest.raises(ValueError, match="not a folder"):
        next(read_samples(write_rows(tmp_path, OWN), tmp_path / "nowhere"))
    with pytest.raises(SampleError, match="line 1"):
        next(read_samples(write_rows(tmp_path, "{"), images))


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
