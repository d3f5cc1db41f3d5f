"""inspect: for people and as JSON, with tensors or without."""

from __future__ import annotations

import json

import pytest

from checkpoint_tools import inspect


def test_tensors_are_listed_when_asked(made, capsys):
    inspect.main([str(made / "hf")])
    assert "multi_modal_projector.linear_1.weight" not in capsys.readouterr().out
    inspect.main([str(made / "hf"), "--tensors"])
    assert "float32   [96, 256]                multi_modal_projector.linear_1.weight" in capsys.readouterr().out
    inspect.main([str(made / "hf"), "--tensors", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["tensors"]["multi_modal_projector.linear_1.weight"] == {"dtype": "float32", "shape": [96, 256]}
    assert found["kind"] == "whole model"


def test_what_is_no_checkpoint_ends_with_code_1(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        inspect.main([str(tmp_path)])
    assert stopped.value.code == 1
    assert f"error: no finished checkpoint in {tmp_path}" in capsys.readouterr().err
