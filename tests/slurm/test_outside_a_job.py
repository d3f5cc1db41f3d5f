"""The sbatch scripts outside of a job: `bash slurm/X.sh` rehearses what `sbatch slurm/X.sh` would run, and ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_r1v2.config.load import load_recipe, load_recipe_as
from megatron_r1v2.config.recipes import EvaluateRecipe
from megatron_r1v2.planning.hardware import HARDWARE
from megatron_r1v2.planning.known_models import KNOWN_MODELS
from megatron_r1v2.planning.scale_page import read_cluster
from tests.examples.test_r1v2_38b import JOBS
from tests.rehearsal.test_few_layers import LINE

ROOT = Path(__file__).parents[2]
OVERRIDES = ("run.seed=7", "train.prompts_per_step=64")
RECORDER = """#!/usr/bin/env bash
printf '%q ' "$@" > "$RECORDS/${0##*/}"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $2 == hostnames ]]; then echo node-1; fi
if [[ $1 == requeue ]]; then touch "$RECORDS/requeued"; fi
"""
WARNED_SRUN = """#!/usr/bin/env bash
trap '' USR1
kill -USR1 "$PPID"
sleep 0.5
"""


def run_script(
    script: str, folder: Path, *arguments: str, srun: str = RECORDER, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of slurm/ with python, srun and scontrol that only write into a folder how they were called."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in (("python", RECORDER), ("srun", srun), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    around = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "R1V2_"))}
    around |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "RECORDS": str(folder)}
    return subprocess.run(
        ["bash", str(ROOT / "slurm" / script), *arguments],
        env=around | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def in_a_job(nodes: str = "1", gpus: str = "8") -> dict[str, str]:
    """Return the variables of a job, whose nodes the scontrol of `run_script` names."""
    return {
        "SLURM_JOB_ID": "5",
        "SLURM_JOB_NODELIST": "node-[1-9]",
        "SLURM_JOB_NUM_NODES": nodes,
        "SLURM_GPUS_ON_NODE": gpus,
        "SLURM_SUBMIT_DIR": str(ROOT),
    }


def called(folder: Path, name: str) -> list[str]:
    """Return the arguments that a command was called with."""
    return shlex.split((folder / name).read_text())


def options(arguments: list[str]) -> dict[str, str]:
    """Return the values of options, given as `--name=value` or `--name value`."""
    joined = " ".join(arguments).replace("=", " ").split()
    return {name: value for name, value in pairwise(joined) if name.startswith("--")}


@pytest.mark.parametrize(("name", "requeued"), [("grpo", True), ("mpo", True), ("pairs", False), ("evaluate", False)])
def test_a_stage_that_does_not_hear_the_warning_is_finished_when_it_ends_well(
    tmp_path: Path, name: str, requeued: bool
) -> None:
    """Put back, pairs would refuse the folder that it has written, and the jobs of the pipeline would wait for ever."""
    ended = run_script(
        f"{name}_38b.sh",
        tmp_path,
        srun=WARNED_SRUN,
        R1V2_LOGS=str(tmp_path / "logs"),
        **in_a_job(),
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "requeued").exists() is requeued


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_it_rehearses_the_recipe_settings_and_gpus_of_the_job(job: Path, tmp_path: Path) -> None:
    outside = run_script(job.name, tmp_path, *OVERRIDES)
    assert outside.returncode == 0, outside.stderr
    assert "not in a job, so this rehearses" in outside.stderr
    assert not (tmp_path / "srun").exists(), "nothing is started but the rehearsal"
    module, command, recipe, *rest = called(tmp_path, "python")[1:]
    assert (module, command, rest[-len(OVERRIDES) :]) == ("megatron_r1v2", "rehearse", list(OVERRIDES))

    asked = dict(re.findall(r"^#SBATCH (--nodes|--gpus-per-node)=(\d+)$", job.read_text(), re.MULTILINE))
    inside = run_script(
        job.name,
        tmp_path,
        *OVERRIDES,
        **in_a_job(nodes=asked["--nodes"], gpus=asked["--gpus-per-node"]),
    )
    assert inside.returncode == 0, inside.stderr
    started = called(tmp_path, "srun")
    stage, *run = started[started.index("megatron_r1v2") + 1 :]
    assert run == [recipe, *OVERRIDES], "the same recipe and the same settings"
    assert load_recipe(ROOT / recipe).stage == stage.replace("-", "_")
    torchrun, rehearsed = options(started), options(rest)
    gpus = int(torchrun["--nnodes"]) * int(torchrun["--nproc-per-node"])
    assert (rehearsed["--gpus"], rehearsed["--gpus-per-node"]) == (str(gpus), torchrun["--nproc-per-node"])
    assert (gpus, HARDWARE[rehearsed["--gpu"]]) == read_cluster(ROOT / recipe), "the cluster of the recipe's header"


def test_another_recipe_and_another_gpu_are_those_of_the_environment(tmp_path: Path) -> None:
    assert run_script("grpo_38b.sh", tmp_path, R1V2_RECIPE="own.yaml", R1V2_GPU="h200").returncode == 0
    command = called(tmp_path, "python")
    assert command[:4] == ["-m", "megatron_r1v2", "rehearse", "own.yaml"]
    assert options(command)["--gpu"] == "h200"


def test_nodes_are_those_that_sbatch_would_be_given(tmp_path: Path) -> None:
    outside = run_script("grpo_38b.sh", tmp_path, "--nodes=4", *OVERRIDES, "--data")
    assert outside.returncode == 0, outside.stderr
    assert "rehearses grpo on 4 x 8 GPUs; sbatch --nodes=4 slurm/grpo_38b.sh runs it" in outside.stderr
    command = called(tmp_path, "python")
    assert (options(command)["--gpus"], options(command)["--gpus-per-node"]) == ("32", "8")
    assert command[-3:] == [*OVERRIDES, "--data"], "all else goes on to the rehearsal"
    assert "--nodes=4" not in command


@pytest.mark.parametrize("nodes", ["0", "two", "1-4", ""])
def test_nodes_that_are_no_number_are_refused(tmp_path: Path, nodes: str) -> None:
    refused = run_script("grpo_38b.sh", tmp_path, f"--nodes={nodes}")
    assert refused.returncode == 2
    assert f"slurm/grpo_38b.sh: --nodes={nodes}; accepted: a whole number from 1" in refused.stderr


@pytest.mark.parametrize(
    ("script", "status", "message"),
    [
        ("evaluate_38b.sh", 2, "slurm/evaluate_38b.sh: an evaluation is not rehearsed; submit it with sbatch"),
        ("convert_38b.sh", 1, "SLURM_SUBMIT_DIR: submit this with sbatch"),
    ],
)
def test_what_no_rehearsal_is_for_says_so_and_ends(tmp_path: Path, script: str, status: int, message: str) -> None:
    ended = run_script(script, tmp_path)
    assert ended.returncode == status
    assert message in ended.stderr
    assert not {"python", "srun"} & {path.name for path in tmp_path.iterdir()}


def test_the_command_for_the_published_folder_evaluates_it_with_its_authors_sampling(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text().replace("\\\n", " ")
    ((recipe, script, rest),) = re.findall(r"R1V2_RECIPE=(\S+) sbatch slurm/(\S+) (.*)", page)
    ended = run_script(
        script,
        tmp_path,
        *shlex.split(rest),
        R1V2_RECIPE=recipe,
        **in_a_job(),
    )
    assert ended.returncode == 0, ended.stderr
    started = called(tmp_path, "srun")
    stage, path, *overrides = started[started.index("megatron_r1v2") + 1 :]
    place = overrides.index("--name")
    assert overrides[place : place + 2] == ["--name", "mmmu"]
    read = load_recipe_as(EvaluateRecipe, ROOT / path, overrides[:place] + overrides[place + 2 :])
    assert (stage, read.model.hf_path, read.model.checkpoint) == ("evaluate", "checkpoints/Skywork-R1V2-38B", "")
    assert (read.parallel.tensor, read.evaluation.data, read.run.output_dir) == (8, "data/mmmu", "runs/evaluation")
    sampling = (read.evaluation.temperature, read.evaluation.top_p, read.generation.max_response_tokens)
    assert sampling == (0.6, 0.95, 65536)


@pytest.mark.slow
def test_a_rehearsal_of_few_layers_runs_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LINE.few.given_to(KNOWN_MODELS["r1v2-38b"])))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", str(ROOT / "slurm" / "align_38b.sh"), "--hf-config", str(tmp_path / "config.json")],
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "rehearsed as TP8 PP1 DP1 on 8 x 79.6 GiB" in ended.stdout
    assert "It runs and fits" in ended.stdout
