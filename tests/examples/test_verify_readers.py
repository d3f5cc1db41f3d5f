"""Questions for other readers of an export, and the comparison of their answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from examples.verify_readers import ask, compare, write_questions
from tests.tiny import tiny_sample
from tests.tiny_hf import tiny_hf_model


def test_answers_are_counted_against_the_first_reader():
    first, other = {"a": "8", "b": "7"}, {"a": "8", "b": "7 "}
    assert compare({"ours": first, "theirs": other, "fewer": {"b": "7"}}) == [
        {"reader": "ours", "pictures": 2, "answers_equal": 2},
        {"reader": "theirs", "pictures": 2, "answers_equal": 1},
        {"reader": "fewer", "pictures": 2, "answers_equal": 1},
    ]


def test_transformers_is_asked_in_a_process_of_its_own(tmp_path):
    tiny_hf_model(tmp_path / "hf", seed=1)
    questions = write_questions([tiny_sample(0), tiny_sample(1)], tmp_path)
    asked = json.loads(questions.read_text())
    assert [each["key"] for each in asked] == [tiny_sample(0).key, tiny_sample(1).key]
    assert all(not each["text"].startswith("<image>") and Path(each["image"]).is_file() for each in asked)
    name, answers = ask(sys.executable, "transformers", tmp_path / "hf", questions, 5)
    assert name.startswith("transformers 5.")
    assert [*answers] == [each["key"] for each in asked]
    assert all(answers.values())


def test_a_reader_that_fails_is_told_with_what_it_said(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "no $2" >&2\nexit 3\n')
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match="vllm of .* failed; .*\nno vllm"):
        ask(str(python), "vllm", tmp_path, tmp_path / "questions.json", 5)


def test_a_text_without_a_picture_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not one question that begins with its one <image>"):
        write_questions([tiny_sample(0, images={})], tmp_path)
