"""verify: the exit code, and what it prints of one checkpoint and of two."""

from __future__ import annotations

import json
import re

import pytest

from checkpoint_tools import verify


def test_one_checkpoint_is_read_through(made, capsys):
    verify.main([str(made / "chat")])
    told = capsys.readouterr().out
    assert re.fullmatch(r"chat: \d\d parameters read, sha256 [0-9a-f]{64}\ncompared with: manifest\n", told)


def test_the_exit_code_says_whether_two_are_the_same(made, capsys):
    verify.main([str(made / "chat"), str(made / "megatron")])
    assert capsys.readouterr().out.endswith("the same\n")
    with pytest.raises(SystemExit) as stopped:
        verify.main([str(made / "chat"), str(made / "other"), "--json", "--workers", "1"])
    assert stopped.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert len(found["different"]) == found["parameters"]
    with pytest.raises(SystemExit) as stopped:
        verify.main([str(made / "chat"), "--logits"])
    assert stopped.value.code == 2
    assert "--logits needs two checkpoints" in capsys.readouterr().err
