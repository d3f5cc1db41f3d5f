"""Rows of three kinds become samples; a bad row is named by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_r1v2.data.row_forms import USUAL_COLUMNS, RowForm
from megatron_r1v2.data.rows import read_rows
from megatron_r1v2.data.samples import SampleError, encode_record, parse_sample
from megatron_r1v2.resilience.json_lines import append_json_lines
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


def write_rows(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "my rows.v2.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_our_own_rows(tmp_path: Path, images: Path) -> None:
    path = write_rows(tmp_path, OWN, "", {**OWN, "key": "k1", "images": ["b.jpg"], "response": "8</think>8"})
    first, second = read_rows(path, images)
    assert first.key == "my-rows-v2-00000001"
    assert first.images == {"0.png": tiny_png(1)}
    assert (first.answer, first.answer_type, first.facts) == ("8", "numeric", {"left": "3", "right": "5"})
    assert (second.key, second.response) == ("k1", "8</think>8")
    assert second.images == {"0.jpg": (images / "b.jpg").read_bytes()}


def test_mmpr_rows_become_preference_pairs(tmp_path: Path, images: Path) -> None:
    (sample,) = read_rows(write_rows(tmp_path, MMPR), images)
    assert sample.messages == ({"role": "user", "content": "<image>\nWhat is shown?"},)
    assert (sample.chosen, sample.rejected, sample.answer) == ("A cat.", "A dog.", "")
    assert list(sample.images) == ["0.png"]


def test_verl_rows_become_prompts(tmp_path: Path, images: Path) -> None:
    (sample,) = read_rows(write_rows(tmp_path, VERL), images, form=RowForm(answer_type="numeric"))
    assert sample.messages == tuple(VERL["prompt"])
    assert (sample.answer, sample.answer_type, sample.source) == ("42", "numeric", "geometry")


def test_other_image_formats_are_stored_as_png(tmp_path: Path, images: Path) -> None:
    (sample,) = read_rows(write_rows(tmp_path, {**OWN, "images": ["c.gif"]}), images)
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
def test_a_bad_row_is_an_error_with_its_line_or_is_reported_and_left_out(
    tmp_path: Path, images: Path, message: str, row: Any
) -> None:
    path = write_rows(tmp_path, {**OWN, "key": "first"}, row, OWN)
    with pytest.raises(SampleError) as refused:
        list(read_rows(path, images))
    assert f"{path}, line 2: " in str(refused.value)
    assert message in str(refused.value)
    reported: list[str] = []
    assert [sample.key for sample in read_rows(path, images, report=reported.append)] == [
        "first",
        "my-rows-v2-00000003",
    ]
    assert reported == [str(refused.value)]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(
        ["a.png", "<image>", "data:image/png;base64,xx", "8", "user", "assistant", "text", "image", "\ud83d"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "from", "value", "path", "bytes", "ground_truth"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
COLUMNS = sorted({column for columns in USUAL_COLUMNS.values() for column in columns if "." not in column})
MORE = ["reward_model", "facts", "metadata", "alternatives", "tolerances", "answer_type", "schema", "options", "more"]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*COLUMNS, *MORE]), VALUES, max_size=6))
def test_no_row_does_more_than_be_refused(tmp_path: Path, images: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(OWN) + "\n")
    refused: list[str] = []
    read = list(read_rows(path, images, report=refused.append))
    assert len(read) + len(refused) == 2
    assert read[-1].key == "rows-00000002"
    for sample in read:
        assert parse_sample(sample.key, {"json": encode_record(sample), **sample.images}) == sample


def test_inputs_that_cannot_be_read(tmp_path: Path, images: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        next(read_rows(write_rows(tmp_path, OWN), tmp_path / "nowhere"))
    with pytest.raises(SampleError, match="line 1"):
        next(read_rows(write_rows(tmp_path, "{"), images))


def test_written_rows_are_read_back(tmp_path: Path, images: Path) -> None:
    rows = [{**OWN, "key": "one"}, {**OWN, "key": "two", "answer": "\u00fc\n8"}]
    append_json_lines(tmp_path / "rows.jsonl", rows)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2
    assert [(s.key, s.answer) for s in read_rows(tmp_path / "rows.jsonl", images)] == [
        ("one", "8"),
        ("two", "\u00fc\n8"),
    ]
