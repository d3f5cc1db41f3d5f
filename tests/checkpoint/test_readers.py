"""An export in the layout of transformers, read by the versions of transformers that people have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint_tools import megatron_to_hf
from tests.checkpoint.damage import run

# Without dependencies: torch and the others are those that are installed.
OLDER = ("transformers==4.57.6", "tokenizers==0.22.1", "huggingface-hub==0.36.2")


def answer(export: Path, *older: Path) -> dict:
    command = [sys.executable, str(Path(__file__).parent / "answers.py"), str(export), *map(str, older)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_transformers_4_and_5_give_the_same_answer(made, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "older")]
    if subprocess.run([*install, *OLDER], capture_output=True).returncode:
        pytest.skip("no package index, or it has no transformers 4.57")
    run(megatron_to_hf, "--checkpoint", made / "run", "--output", tmp_path / "out", "--quiet")
    newer, older = answer(tmp_path / "out"), answer(tmp_path / "out", tmp_path / "older")
    assert newer.pop("version") >= "5"
    assert older.pop("version") == "4.57.6"
    assert newer == older
