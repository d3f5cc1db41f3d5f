"""The folder that goes with the tree to a machine without a network."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_carry
from benchmarks.gpu_carry import PACKAGES, copy_demo, download_wheels, locked, main, tree_bytes
from benchmarks.gpu_demo import demo_settings, read_steps, run_demo
from megatron_r1v2.config.load import load_recipe
from tests.stages.runs import recipe_for, run_stage
from tests.stages.tiny_run import tiny_recipe


def test_every_wheel_has_the_version_of_the_lock_for_the_python_of_the_device(monkeypatch, tmp_path) -> None:
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    download_wheels(tmp_path / "wheels", ["--index-url=somewhere"])
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--python-version=3.12", "--index-url=somewhere"} <= set(command)
    versions = locked()
    assert {f"{name}=={versions[name]}" for name in PACKAGES} <= set(command)


def test_a_made_demo_is_copied_and_runs_where_it_lies(tmp_path: Path) -> None:
    made, tiny = tmp_path / "digits", tmp_path / "tiny"
    tiny_recipe(tiny)
    run_stage(recipe_for(tiny, made / "mpo", ("train.steps=1",), stage="align"))
    (tiny / "model").rename(made / "base")
    (made / "shards").mkdir()
    (tiny / "data").rename(made / "shards" / "grpo")
    copy_demo(made, tmp_path / "demo")
    file = tmp_path / "demo" / "recipe.yaml"
    # As many prompts as the tiny data set has.
    file.write_text(re.sub(r"prompts_per_step: \d+", "prompts_per_step: 6", file.read_text()))
    recipe = load_recipe(file, demo_settings(tmp_path / "run", 1))
    for path in (recipe.model.hf_path, recipe.model.checkpoint, recipe.data.train):
        assert Path(path).is_dir()
        assert Path(path).is_relative_to(tmp_path / "demo")
    run_stage(recipe)
    assert [line["step"] for line in read_steps(tmp_path / "run" / "metrics.jsonl")] == [1]
    with pytest.raises(ValueError, match="holds no demo with a finished mpo stage; make demo makes it"):
        copy_demo(tmp_path / "nowhere", tmp_path / "other")


RUN = """#!/bin/sh
test "$1 $3" = "-c FOLDER/recipe.yaml" || exit 1
folder=${4#run.output_dir=}
mkdir -p "$folder"
echo '{"step": 1, "actor/loss": 0.5}' > "$folder/metrics.jsonl"
until grep -q actor OUTPUT; do sleep 0.01; done  # told as soon as it is known
printf '{"step": 2}\\n{"step": 3' >> "$folder/metrics.jsonl"
exit 7
"""


def test_the_steps_of_the_demo_are_told_as_they_come_and_how_it_ended(tmp_path: Path, monkeypatch) -> None:
    output, program = tmp_path / "found.json", tmp_path / "python"
    program.write_text(RUN.replace("FOLDER", str(tmp_path / "demo")).replace("OUTPUT", str(output)))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert run_demo(tmp_path / "demo", output, 12) == 7
    assert json.loads(output.read_text())["steps"] == [{"step": 1, "actor/loss": 0.5}, {"step": 2}], "whole lines"


def test_a_tree_that_is_too_large_to_travel_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    alone = tree_bytes(tmp_path)
    assert alone > 2**20
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "one.whl").write_bytes(bytes(1000))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "unpacked.py").write_bytes(bytes(5000))
    assert tree_bytes(tmp_path) == alone + 1000
    monkeypatch.setattr(gpu_carry, "CARRIED", tmp_path)
    assert main(["size"]) == 0, "the tree alone"
    monkeypatch.setattr(gpu_carry, "LIMIT", alone)
    assert main(["size"]) == 1
    assert "MiB of" in capsys.readouterr().out
