"""Rows into samples: keys, prompts, the place of a bad row, and rows that come twice."""

import json

import pytest

from megatron_r1v2.evaluation.benchmarks.prompts import CHOICE_INSTRUCTION, OPEN_INSTRUCTION
from megatron_r1v2.evaluation.benchmarks.readers import Question
from megatron_r1v2.evaluation.benchmarks.samples import benchmark_samples, to_sample
from tests.tiny import tiny_png


def test_a_question_is_asked_as_the_paper_does():
    question = Question(
        "Art/1 b", "Which <image 2>? ", "B", "choice", ("red", "blue"), ("blue",),
        tolerances=(0.1,), images={1: tiny_png(1), 2: tiny_png(2)}, metadata={"subject": "Art"},
    )  # fmt: skip
    sample = to_sample("mmmu", "MMMU", question)
    assert sample.key == "mmmu-Art-1-b"
    text = f"<image>\nWhich <image>? \nA. red\nB. blue\n{CHOICE_INSTRUCTION}"
    assert sample.messages == ({"role": "user", "content": text},)
    assert list(sample.images.values()) == [tiny_png(1), tiny_png(2)], "the one without a mark comes first"
    assert (sample.answer, sample.answer_type, sample.alternatives) == ("B", "choice", ("blue",))
    assert (sample.tolerances, sample.source) == ((0.1,), "mmmu")
    assert sample.metadata == {"benchmark": "MMMU", "subject": "Art"}
    free = to_sample("aime2024", "AIME 2024", Question("x" * 100, "How many?", "3", "math"))
    assert free.messages[0]["content"] == f"How many?\n{OPEN_INSTRUCTION}"
    assert len(free.key) == 80


def write(path, *ids):
    rows = [{"id": number, "problem": "?", "answer": "3"} for number in ids]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_samples_come_in_the_order_of_the_files_that_are_chosen(tmp_path):
    write(tmp_path / "b.jsonl", 3, 1)
    write(tmp_path / "a.jsonl", 2)
    keys = [sample.key for sample in benchmark_samples("aime2024", tmp_path, tmp_path)]
    assert keys == ["aime2024-2", "aime2024-3", "aime2024-1"]
    assert [sample.key for sample in benchmark_samples("aime2024", tmp_path, tmp_path, "a*")] == ["aime2024-2"]
    with pytest.raises(ValueError, match=r"--only 'c\*' matches no data file in"):
        list(benchmark_samples("aime2024", tmp_path, tmp_path, "c*"))


def test_a_row_that_comes_twice_is_named_with_its_first_place(tmp_path):
    write(tmp_path / "a.jsonl", 1, 2)
    write(tmp_path / "b.jsonl", 2)
    with pytest.raises(ValueError, match=r"b.jsonl, row 1: key 'aime2024-2' was used by .*a.jsonl, row 2 already"):
        list(benchmark_samples("aime2024", tmp_path, tmp_path))


def test_a_bad_row_is_named_by_its_place(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "problem": "?", "answer": "3"}\n{"id": 2, "problem": "?"}\n')
    samples = benchmark_samples("aime2024", tmp_path, tmp_path)
    assert next(samples).key == "aime2024-1"
    with pytest.raises(ValueError, match=r"a.jsonl, row 2: "):
        next(samples)
