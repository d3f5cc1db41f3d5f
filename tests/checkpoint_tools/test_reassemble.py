"""The command line of reassemble; what it makes is tested in test_components.py."""

from __future__ import annotations

import pytest

from checkpoint_tools import hf_to_hf, hf_to_megatron, megatron_to_hf, reassemble
from tests.tiny_hf import tiny_hf_language, tiny_hf_vision


def test_it_splices_and_says_what_it_made(tmp_path, capsys):
    tiny_hf_vision(tmp_path / "vision")
    tiny_hf_language(tmp_path / "language")
    parts = ["--vision", str(tmp_path / "vision"), "--language", str(tmp_path / "language")]
    reassemble.main([*parts, "--output", str(tmp_path / "out"), "--dtype", "bf16"])
    assert "adapter: random, 16 image tokens a tile" in capsys.readouterr().out
    assert (tmp_path / "out" / "config.json").is_file()
    with pytest.raises(SystemExit) as stopped:
        reassemble.main([*parts, "--output", str(tmp_path / "out")])
    assert stopped.value.code == 1
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("tool", [reassemble, hf_to_hf, hf_to_megatron, megatron_to_hf])
def test_help_has_an_example(tool, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--help"])
    assert stopped.value.code == 0
    assert f"python -m checkpoint_tools.{tool.__name__.split('.')[-1]}" in capsys.readouterr().out
