"""An export in the layout of transformers, read by the versions of transformers that people have, and by vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint_tools import hf_to_hf, megatron_to_hf
from tests.checkpoint.damage import run
from tests.tiny_hf import tiny_hf_model, tiny_text_config, tiny_vision_config

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


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="no vLLM: run `make vllm-test`")
def test_vllm_gives_the_same_answer(tmp_path):
    # Its attention on a CPU wants heads of 32 channels or more.
    text = tiny_text_config(hidden=128, heads=4, kv_heads=2)
    tiny_hf_model(tmp_path / "hf", vision=tiny_vision_config("300m", heads=2, head_size=32), text=text, seed=2)
    run(hf_to_hf, "--hf", tmp_path / "hf", "--output", tmp_path / "out", "--quiet")
    expected = answer(tmp_path / "out")
    assert len(set(expected["answer"])) > 3
    # In one process, and with memory for one short answer: by default it takes most of the machine's.
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
    command = [os.environ["VLLM_PYTHON"], str(Path(__file__).parent / "vllm_answers.py"), str(tmp_path / "out")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    got = json.loads(ended.stdout.splitlines()[-1])
    assert {key: got[key] for key in ("prompt", "answer")} == {key: expected[key] for key in ("prompt", "answer")}
