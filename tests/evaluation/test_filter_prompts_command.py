"""`r1v2 filter-prompts`: a help that teaches, and bad options; `test_filter_prompts.py` runs it."""

import pytest

from megatron_r1v2.evaluation.filter_prompts_command import main


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for words in ("the filtered prompt pool of the R1V2 report", "evaluation.runs=8", "--most MOST", "pool.json"):
        assert words in told


def test_bad_options_are_told(tmp_path, capsys):
    arguments = ["rows.jsonl", "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--most", "-1"])
    assert caught.value.code == 2
    assert "--most is -1; accepted is 0 (all) or more" in capsys.readouterr().err
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert "error: rows.jsonl is not there" in told
    assert "Nothing was written." in told
