"""The filtered prompt pool: what a model answers sometimes rightly and sometimes wrongly is kept, and only that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1v2.data.samples import parse_sample
from megatron_r1v2.data.stream import read_shards
from megatron_r1v2.evaluation.filter_prompts_command import main
from tests.tiny import tiny_shards

# Of the prompts 0 to 4, right responses of four; nothing of prompt 5.
RIGHT = {0: 4, 1: 1, 2: 0, 3: 2, 4: 3}


def key(index: int) -> str:
    return f"digits-{index:04d}"


def write_rows(path: Path, right: dict[int, int], responses: int = 4) -> Path:
    rows = [
        {"prompt_key": key(index), "sample_index": sample, "rule_correct": sample < count, "correct": True}
        for sample in range(responses)
        for index, count in right.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tiny_shards(tmp_path / "data", 6)


def test_prompts_that_teach_are_kept_as_they_were(tmp_path: Path, data: Path, capsys) -> None:
    rows, output = write_rows(tmp_path / "rows.jsonl", RIGHT), tmp_path / "pool"
    assert main([str(rows), "--data", str(data), "--output", str(output)]) == 0
    by_key = {sample.key: sample for sample in read_shards(data, parse_sample)}
    assert list(read_shards(output, parse_sample)) == [by_key[key(index)] for index in (1, 3, 4)]
    record = json.loads((output / "pool.json").read_text())
    assert [prompt["prompt_key"] for prompt in record["kept"]] == [key(3), key(1), key(4)]
    assert record["kept"][0] == {"prompt_key": key(3), "pass_rate": 0.5, "num_responses": 4, "weight": 1.0}
    counts = {name: value for name, value in record.items() if name != "kept"}
    assert counts == {"prompts": 6, "without responses": 1, "always right": 1, "always wrong": 1, "sometimes right": 3}
    assert "kept:" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "pool", "rows.jsonl"]


def test_results_of_several_files_count_together(tmp_path: Path, data: Path) -> None:
    first = write_rows(tmp_path / "first.jsonl", {0: 1, 1: 1}, responses=1)
    second = write_rows(tmp_path / "second.jsonl", {0: 0, 1: 1}, responses=1)
    assert main([str(first), str(second), "--data", str(data), "--output", str(tmp_path / "pool")]) == 0
    assert [sample.key for sample in read_shards(tmp_path / "pool", parse_sample)] == [key(0)]


def test_the_most_telling_are_kept_when_fewer_are_wanted(tmp_path: Path, data: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", RIGHT)
    assert main([str(rows), "--data", str(data), "--output", str(tmp_path / "pool"), "--most", "2"]) == 0
    assert [sample.key for sample in read_shards(tmp_path / "pool", parse_sample)] == [key(1), key(3)]


@pytest.mark.parametrize(
    ("right", "arguments", "message"),
    [
        ({0: 4, 2: 0}, [], "none of the 2 prompts has both right and wrong responses"),
        ({0: 1, 77: 1}, [], "1 prompts of the responses are not in"),
        ({0: 1}, ["rows.jsonl"], "is given twice"),
        ({0: 1}, ["missing.jsonl"], "missing.jsonl is not there"),
        ({0: 1}, ["broken.jsonl"], "broken.jsonl is not valid JSON"),
        ({0: 1}, ["other.jsonl"], "row 1: no prompt_key and rule_correct"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    right: dict[int, int], arguments: list[str], message: str, tmp_path: Path, data: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("rows.jsonl"), right)
    Path("broken.jsonl").write_text('{"prompt_key": "a", "rule_corr')
    Path("other.jsonl").write_text('{"step": 3, "actor/loss": 0.1}\n')
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["rows.jsonl", *arguments, "--data", str(data), "--output", "pool"]) == 1
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_that_exists_is_left_alone(tmp_path: Path, data: Path, capsys) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", RIGHT)
    assert main([str(rows), "--data", str(data), "--output", str(data)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert len(list(read_shards(data, parse_sample))) == 6
