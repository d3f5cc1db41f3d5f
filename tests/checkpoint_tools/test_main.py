"""`python -m checkpoint_tools` lists every tool, a line each, without importing torch."""

from __future__ import annotations

import subprocess
import sys

import checkpoint_tools
from checkpoint_tools.__main__ import main, tools


def test_every_tool_is_listed_with_a_sentence(capsys):
    main()
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "usage: python -m checkpoint_tools.NAME --help"
    names = {line.split()[0] for line in told[2:]}
    assert names == {"hf_to_hf", "hf_to_megatron", "inspect", "megatron_to_hf", "parts", "reassemble", "verify"}
    assert all(line.endswith(".") for line in tools().values())


def test_the_list_needs_no_torch():
    code = "import sys, checkpoint_tools.__main__ as m; m.main(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_tool_is_a_small_file():
    from pathlib import Path

    for path in Path(checkpoint_tools.__path__[0]).glob("*.py"):
        assert len(path.read_text().splitlines()) <= 80, path.name
