"""Lines that survive their writer: whole ones are read, half a line is taken off."""

import json
import os

import pytest

from megatron_r1v2.resilience import json_lines
from megatron_r1v2.resilience.json_lines import append_json_lines, recover_json_lines


def test_appended_rows_are_read_back_in_order(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    assert list(recover_json_lines(path)) == []
    append_json_lines(path, [{"a": 1}, {"text": "b\u2028c\n"}])
    append_json_lines(path, [{"a": 2}])
    found = list(recover_json_lines(path))
    assert [number for number, _ in found] == [1, 2, 3]
    assert [json.loads(line) for _, line in found] == [{"a": 1}, {"text": "b\u2028c\n"}, {"a": 2}]


@pytest.mark.parametrize("half", [b'{"a":', b'{"a": 2}', b"\xff"])
def test_half_a_line_is_taken_off_before_the_next_is_appended(tmp_path, half):
    path = tmp_path / "rows.jsonl"
    append_json_lines(path, [{"a": 1}])
    path.write_bytes(path.read_bytes() + half)
    assert [line for _, line in recover_json_lines(path)] == [b'{"a": 1}']
    append_json_lines(path, [{"a": 3}])
    assert path.read_bytes() == b'{"a": 1}\n{"a": 3}\n'


def test_a_file_of_half_a_line_is_empty_afterwards(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a"')
    assert list(recover_json_lines(path)) == []
    assert path.read_bytes() == b""


def test_other_line_ends_of_unicode_stay_in_a_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\u2028b\u0085c"}\n', encoding="utf-8")
    assert len(list(recover_json_lines(path))) == 1


def test_rows_are_synced_before_the_call_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(json_lines.os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    append_json_lines(tmp_path / "rows.jsonl", [{"a": 1}])
    assert synced == [len('{"a": 1}\n')]


def test_a_row_that_is_refused_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_json_lines(path, [{"a": float("nan")}])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        append_json_lines(path, [{"a": 1}, {"a": float("inf")}], allow_nan=False)
    assert path.read_bytes() == before
