import json

import pytest

from examples.digits.verify_endpoint import LmEvalTask, compare, lm_eval_python, main, run_lm_eval, served


def test_evaluations_are_set_beside_the_first():
    first = {"a": ("8", True), "b": ("7", False), "c": ("6", True)}
    other = {"a": ("8", True), "b": ("5", True), "c": ("60", True)}
    rows = compare({"in process": first, "served": other})
    assert rows[0] == {
        "evaluated": "in process", "prompts": 3, "accuracy": 2 / 3, "responses_equal": 3, "verdicts_equal": 3,
    }  # fmt: skip
    assert rows[1] == {
        "evaluated": "served", "prompts": 3, "accuracy": 1.0, "responses_equal": 1, "verdicts_equal": 2,
    }  # fmt: skip


def test_an_output_that_is_there_is_not_mixed_with_a_new_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["verify_endpoint", "--run", str(tmp_path), "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert f"--output {tmp_path} exists; remove it" in capsys.readouterr().err


def test_a_server_that_does_not_start_is_told(tmp_path, capfd):
    with pytest.raises(SystemExit, match="the server did not start"), served(tmp_path / "none", ()):
        pass
    assert "is not a folder" in capfd.readouterr().err


def test_lm_eval_is_found_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_EVAL_PYTHON", "some/python")
    assert lm_eval_python() == "some/python"


def test_a_failing_lm_eval_is_told_with_what_it_said(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "no task $9" >&2\nexit 3\n')
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match="no task mine"):
        run_lm_eval(str(python), LmEvalTask("mine"), tmp_path / "out", url="http://127.0.0.1:9/v1", model="m")


def test_what_lm_eval_writes_is_read(tmp_path):
    python = tmp_path / "python"
    folder = tmp_path / "out" / "m"
    python.write_text(
        f"#!/bin/sh\nmkdir -p {folder}\n"
        f"echo '{json.dumps({'results': {'mine': {'acc': 1.0}}})}' > {folder}/results_1.json\n"
        f"echo '{json.dumps({'doc': {'key': 'a'}})}' > {folder}/samples_mine_1.jsonl\n"
    )
    python.chmod(0o755)
    found = run_lm_eval(str(python), LmEvalTask("mine"), tmp_path / "out", url="http://127.0.0.1:9/v1", model="m")
    assert found == ({"acc": 1.0}, [{"doc": {"key": "a"}}])
