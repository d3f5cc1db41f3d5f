"""The log of an evaluation under way: rows that outlive a crash, and other settings that are refused."""

import json

import pytest

from megatron_r1v2.evaluation.response_log import ResponseLog
from megatron_r1v2.resilience.fingerprint import Fingerprint

SETTINGS = Fingerprint.of(model="m", evaluation={"seed": 1, "temperature": 0.6})


def row(key, index, **more):
    return {"prompt_key": key, "sample_index": index, "text": f"{key} {index}", **more}


def test_rows_are_there_again_in_order(tmp_path):
    path = tmp_path / "run" / "evaluation-a.unfinished.jsonl"
    log = ResponseLog(path, SETTINGS)
    assert (log.rows, log.places) == ([], set())
    log.append([row("b", 1), row("a", 1)])
    log.append([row("b", 0)])
    log.append([])
    log = ResponseLog(path, SETTINGS)
    assert log.rows == [row("a", 1), row("b", 0), row("b", 1)]
    assert log.places == {("a", 1), ("b", 0), ("b", 1)}
    log.append([row("a", 1, again=True)])
    log = ResponseLog(path, SETTINGS)
    assert log.rows[0] == row("a", 1, again=True)
    log.discard()
    assert not path.exists()


@pytest.mark.parametrize("end", [b'{"prompt_key": "c", "samp', b'{"prompt_key": "c", "sample_index": 0}', b"{"])
def test_a_line_without_an_end_is_taken_off_and_the_next_is_not_glued_to_it(tmp_path, end):
    path = tmp_path / "log"
    log = ResponseLog(path, SETTINGS)
    log.append([row("a", 0)])
    whole = path.read_bytes()
    path.write_bytes(whole + end)
    log = ResponseLog(path, SETTINGS)
    assert log.places == {("a", 0)}
    assert path.read_bytes() == whole
    log.append([row("c", 0)])
    log = ResponseLog(path, SETTINGS)
    assert log.places == {("a", 0), ("c", 0)}


def test_a_row_is_on_disk_before_append_returns(tmp_path):
    path = tmp_path / "log"
    log = ResponseLog(path, SETTINGS)
    log.append([row("a", 0)])
    # Not closed: the process may be killed here.
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == [row("a", 0)]


@pytest.mark.parametrize("line", [b"nonsense\n", b"[]\n", b'{"sample_index": 0}\n', b"5\n"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "log"
    log = ResponseLog(path, SETTINGS)
    log.append([row("a", 0)])
    path.write_bytes(path.read_bytes() + line + json.dumps(row("b", 0)).encode() + b"\n")
    with pytest.raises(ValueError, match=rf"{path}, line 3 is damaged .*delete the line to generate that response"):
        ResponseLog(path, SETTINGS)


def test_other_settings_are_refused_with_what_changed(tmp_path):
    path = tmp_path / "log"
    log = ResponseLog(path, SETTINGS)
    log.append([row("a", 0)])
    other = Fingerprint.of(model="n", evaluation={"seed": 1, "temperature": 1.0})
    with pytest.raises(ValueError, match="unfinished evaluation with other settings") as caught:
        ResponseLog(path, other)
    assert "model was 'm' and is 'n'" in str(caught.value)
    assert "evaluation.temperature was 0.6 and is 1.0" in str(caught.value)
    assert "seed" not in str(caught.value)
    assert path.read_bytes().count(b"\n") == 2, "nothing is lost"


def test_rows_are_compared_where_they_were_noted(tmp_path):
    with_rows = [Fingerprint.of(model="m", evaluation={"seed": 1, "temperature": 0.6, "rows": rows}) for rows in "ab"]
    ResponseLog(tmp_path / "earlier", SETTINGS)
    ResponseLog(tmp_path / "earlier", with_rows[0])
    ResponseLog(tmp_path / "log", with_rows[0])
    with pytest.raises(ValueError, match="other settings: evaluation.rows was 'a' and is 'b'; put them back"):
        ResponseLog(tmp_path / "log", with_rows[1])


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "log"
    path.write_text(json.dumps(row("a", 0)) + "\n")
    with pytest.raises(ValueError, match="it does not begin with its settings"):
        ResponseLog(path, SETTINGS)


def test_numbers_that_json_does_not_have_are_refused(tmp_path):
    log = ResponseLog(tmp_path / "log", SETTINGS)
    with pytest.raises(ValueError, match="JSON compliant"):
        log.append([row("a", 0, total=float("nan"))])
