"""`r1v2 benchmarks`: shards that read back, and bad input that leaves nothing behind."""

import json

import pytest

pytest.importorskip("pyarrow")

from megatron_r1v2.data.samples import parse_sample
from megatron_r1v2.data.stream import read_shards
from megatron_r1v2.evaluation.benchmarks.command import main
from megatron_r1v2.evaluation.benchmarks.samples import benchmark_samples
from tests.evaluation import published


def read(name, folder, only="*"):
    return list(benchmark_samples(name, folder, folder, only))


def test_the_command_writes_shards_that_read_back(tmp_path, capsys):
    published.write_mmmu(tmp_path / "in")
    out = tmp_path / "shards"
    arguments = ["mmmu", "--input", str(tmp_path / "in"), "--only", "validation-*", "--output", str(out)]
    assert main(arguments) == 0
    assert "2 questions" in capsys.readouterr().out
    written = read("mmmu", tmp_path / "in", "validation-*")
    assert sorted(read_shards(out, parse_sample), key=lambda s: s.key) == sorted(written, key=lambda s: s.key)
    assert main(arguments) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "validation_Art_1", "question": "?", "options": "['a', 'b']", "answer": "C"}, "no letter of the 2"),
        ({"id": "validation_Art_1", "question": "?", "options": "a, b", "answer": "A"}, "not the text of a list"),
        ({"question": "?", "options": "['a']", "answer": "A"}, "no 'id'.*file of this benchmark"),
        ({"id": "x", "question": "?", "options": "['a']", "answer": "A", "image_1": "no.png"}, "no.png does not exist"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(tmp_path, capsys, row, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"rows.jsonl, row 1: .*{message}"):
        read("mmmu", tmp_path / "rows.jsonl")
    assert main(["mmmu", "--input", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out")]) == 1
    assert "Nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_benchmark_that_is_not_known_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["mmmmu", "--input", str(tmp_path), "--output", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert "NAME is 'mmmmu'; accepted: aime2024, mmmu, mmmu_pro" in capsys.readouterr().err


def test_images_are_looked_for_beside_the_data_unless_told_where(tmp_path, capsys):
    published.write_mathvista_json(tmp_path / "in")
    assert main(["mathvista", "--input", str(tmp_path / "in" / "testmini.json"), "--output", str(tmp_path / "a")]) == 0
    (tmp_path / "in" / "images").rename(tmp_path / "images")
    arguments = ["mathvista", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "b")]
    assert main(arguments) == 1
    assert "--images" in capsys.readouterr().err
    assert main([*arguments, "--images", str(tmp_path)]) == 0


def test_the_files_of_several_splits_are_no_benchmark(tmp_path, capsys):
    """A published folder has them side by side, and a score is of one."""
    published.write_mmmu(tmp_path / "in")
    arguments = ["mmmu", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "of several splits (validation, dev)" in (error := capsys.readouterr().err)
    assert "give --only 'validation-*' or another, or --only '*' for all" in error
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--only", "*"]) == 0
    assert "3 questions" in capsys.readouterr().out
