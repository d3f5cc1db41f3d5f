"""The installed packages, the shipped files, and the promises of the launch files."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.planning.hardware import HARDWARE
from megatron_r1v2.planning.known_models import KNOWN_MODELS
from megatron_r1v2.planning.plan import Cluster, make_plan
from megatron_r1v2.stages.model_fit import fit_mistakes

ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("examples/**/*.yaml"))
SCRIPTS = sorted(ROOT.glob("slurm/*.sh"))


def locked():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def versions():
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in locked()}


def setup_constant(name):
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (value,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name
    )
    return ast.literal_eval(value)


def test_the_lock_file_pins_everything_exactly():
    pins = locked()
    assert len(pins) > 100
    assert all([specifier.operator for specifier in pin.specifier] == ["=="] for pin in pins)
    assert all(not Version(version).local for version in versions().values()), "a build of one machine"


def test_the_lock_file_covers_what_setup_asks_for():
    found = versions()
    for text in setup_constant("REQUIREMENTS") + setup_constant("EXTRAS")["dev"]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in found, f"{text} is not in requirements.lock"
        assert requirement.specifier.contains(found[name]), f"{text} against {found[name]}"


def test_the_citation_is_of_this_version_and_of_the_report():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert f'version="{cited["version"]}"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert "2504.16656" in cited["references"][0]["url"]


def test_extras_that_pages_name_exist():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = re.findall(r"pip install '(?:\.|megatron_r1v2)\[(.*?)\]'", "".join(page.read_text() for page in pages))
    assert len(named) >= 3
    assert {extra for names in named for extra in names.split(",")} <= set(setup_constant("EXTRAS"))


def test_nothing_for_gpus_and_no_wrong_apex_is_installed():
    names = set(versions())
    assert not [
        name for name in names if name.startswith("nvidia") or name in ("apex", "transformer-engine", "flash-attn")
    ]
    wanted = [Requirement(text).name for texts in setup_constant("EXTRAS").values() for text in texts]
    assert "apex" not in wanted


def test_setup_imports_setuptools_only():
    code = "import sys, runpy; sys.argv = ['setup.py', '--name']; runpy.run_path('setup.py')\n"
    code += "assert not {'torch', 'megatron', 'megatron_r1v2'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "megatron_r1v2"


def tracked_files():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


KNOWN_SITES = {
    "arxiv.org", "github.com", "git-lfs.github.com", "nvcr.io", "download.pytorch.org", "pytorch.org", "huggingface.co",
    "www.w3.org",
    "localhost", "127.0.0.1", "docs.nvidia.com", "example.com",
}  # fmt: skip


def test_files_know_nothing_of_the_machine_they_were_written_on():
    machine_path = re.compile(r"(?<![\w.$}/])/(?:root|home|work|Users|mnt|srv)/\w")
    site = re.compile(r"https?://([\w.-]+)")
    for path in tracked_files():
        if path == Path(__file__):
            continue
        text = path.read_bytes().decode("utf-8", errors="replace")
        assert not machine_path.search(text), f"{path.name}: {machine_path.search(text)}"
        assert set(site.findall(text)) <= KNOWN_SITES, path.name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_is_valid(path):
    load_recipe(path)


def test_the_38b_recipe_fits_the_38b_model():
    recipe = load_recipe(ROOT / "examples/r1v2_38b/grpo.yaml")
    language = r1v2_architecture(KNOWN_MODELS["r1v2-38b"]).language
    assert list(fit_mistakes(recipe, language)) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_launch_scripts_set_resources_and_nothing_else(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(pkill|killall)\b", text), "processes are ended by id"
    settings = {f"{section}.{key}" for section, keys in yaml.safe_load(example_recipe()).items() for key in keys}
    # The recipe of an evaluation is that of the run; which weights are evaluated on which data it cannot say.
    said = {"model.checkpoint"} if path.name == "evaluate_38b.sh" else set()
    assert {name for name in settings if f"{name}=" in text} == said, "settings belong into the recipe"
    if path.name == "pipeline_38b.sh":
        assert "set -euo pipefail" in text  # it submits jobs and is none
    elif path.name != "launch.sh":
        assert "set -euo pipefail" in text
        assert re.search(r"^#SBATCH --signal=B:USR1@\d+$", text, re.MULTILINE)


def example_recipe():
    return (ROOT / "examples/r1v2_38b/grpo.yaml").read_text(encoding="utf-8")


FAKE_SRUN = """#!/usr/bin/env bash
# Stands for one node: drops srun's own options and runs the rest, passing USR1 to every process, as the real one does.
while [[ $1 == --* ]]; do echo "srun $1" >> "$LOG"; shift; done
setsid "$@" & pid=$!
trap 'kill -USR1 -- -$pid' USR1
while kill -0 $pid 2>/dev/null; do wait $pid; done
wait $pid
"""

FAKE_SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'n1\\nn2\\n'; else echo "$*" >> "$LOG"; fi
"""

FAKE_TORCHRUN = f"""#!{sys.executable}
import os, subprocess, sys
with open(os.environ["LOG"], "a") as log:
    print("torchrun", *sys.argv[1:], file=log)
sys.exit(subprocess.run([sys.executable, "-c", os.environ["WORKER"]]).returncode)
"""

# Python, not bash: a shell cannot trap a signal that it was started with ignored.
WORKER = """
import os, signal, sys, time
def say(text):
    with open(os.environ["LOG"], "a") as log:
        print(text, file=log)
def save(number, frame):
    say("saved")
    sys.exit(int(os.environ["STATUS"]))
signal.signal(signal.SIGUSR1, save)
say("ready")
time.sleep(200)
"""


@pytest.mark.parametrize(("status", "requeued"), [(0, True), (3, False)])
def test_a_warning_reaches_the_workers_and_puts_the_job_back(tmp_path, status, requeued):
    log = tmp_path / "log"
    fakes = {"srun": FAKE_SRUN, "torchrun": FAKE_TORCHRUN, "scontrol": FAKE_SCONTROL}
    for name, text in fakes.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(log), "WORKER": WORKER, "STATUS": str(status),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "123456", "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_NODEID": "0", "R1V2_LOGS": str(tmp_path / "logs"),
        "R1V2_CONTAINER": "image.sqsh",
    }  # fmt: skip
    job = subprocess.Popen(["bash", "slurm/grpo_38b.sh", "train.steps=7"], cwd=ROOT, env=environment)
    while not (log.is_file() and "ready" in log.read_text(encoding="utf-8")):
        assert job.poll() is None, "ended before the workers started"
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=240) == status
    lines = log.read_text(encoding="utf-8")
    assert "saved" in lines
    assert ("requeue 123456" in lines) == requeued
    assert "srun --container-image=image.sqsh" in lines
    assert (
        "--redirects 3 --tee 0:3 --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-id=123456-0 "
        "--shutdown-timeout 90 --rdzv-endpoint=n1:23456 -m megatron_r1v2 grpo examples/r1v2_38b/grpo.yaml "
        "train.steps=7"
    ) in lines


def cluster_of(recipe):
    """Return nodes, GPUs of a node and their GB as the header of a recipe says."""
    return re.match(r"# Cluster: (\d+) nodes? x (\d+) GPUs x (\d+)", (ROOT / recipe).read_text()).groups()


FAKE_PYTHON = """#!/usr/bin/env bash
printf '%s ' "$@" > "$LOG"
exit 7
"""


@pytest.mark.parametrize("script", [path for path in SCRIPTS if "launch " in path.read_text(encoding="utf-8")])
def test_outside_of_a_job_a_script_rehearses_what_it_would_run(tmp_path, script):
    if script.name in ("launch.sh", "pipeline_38b.sh"):
        return
    (tmp_path / "python").write_text(FAKE_PYTHON, encoding="utf-8")
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(tmp_path / "log")}
    # From elsewhere: there is no submit folder.
    done = subprocess.run(
        ["bash", str(script), "train.steps=7"], cwd=tmp_path, env=environment, timeout=30, check=False
    )
    if script.name == "evaluate_38b.sh":
        assert done.returncode == 2
        assert not (tmp_path / "log").exists()
        return
    assert done.returncode == 7, "that of the rehearsal"
    text = script.read_text(encoding="utf-8")
    recipe = re.search(r"^launch [\w-]+ (\S+)", text, re.MULTILINE)[1]
    nodes, gpus, _ = map(int, cluster_of(recipe))
    gpu = "h200" if script.name == "grpo_38b_one_gpu.sh" else "h100"
    assert (tmp_path / "log").read_text().split() == (
        f"-m megatron_r1v2 rehearse {recipe} --gpus {nodes * gpus} --gpus-per-node {gpus} --gpu {gpu} train.steps=7"
    ).split()


JOBS = {
    script: found[1]
    for script in SCRIPTS
    if (found := re.search(r"^launch [\w-]+ (\S+)", script.read_text(encoding="utf-8"), re.MULTILINE))
    and script.name not in ("pairs_38b.sh", "evaluate_38b.sh")  # they have no steps that a signal must wait for
}


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.stem)
def test_the_scripts_warn_as_early_as_the_settings_say(script):
    """SIGUSR1 of the training scripts and checkpoint.lead_seconds, which a step's duration is compared with."""
    lead = load_recipe(ROOT / JOBS[script]).checkpoint.lead_seconds
    assert f"#SBATCH --signal=B:USR1@{lead:g}\n" in script.read_text(encoding="utf-8")


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.stem)
def test_the_warning_comes_early_enough_for_a_step_much_longer_than_planned(script):
    """The planner counts with responses half of the longest."""
    recipe = load_recipe(ROOT / JOBS[script])
    nodes, gpus, memory = cluster_of(JOBS[script])
    hardware = HARDWARE["h200" if memory == "141" else "h100"]
    cluster = Cluster(int(nodes) * int(gpus), 8, float(memory), 4.0, hardware)
    plan = make_plan(recipe, KNOWN_MODELS["r1v2-38b"], cluster)
    assert recipe.checkpoint.lead_seconds >= 2.5 * plan.time.total


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return the folder of the package as pip installs it, from a copy of the tracked files; its needs are here."""
    folder = tmp_path_factory.mktemp("installed")
    for path in tracked_files():
        copy = folder / "sources" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder / "package")]
    command = [sys.executable, "-m", "pip", "install", *options, str(folder / "sources")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "package"


def test_pip_installs_a_command_that_helps(installed, tmp_path):
    done = run_installed(installed, tmp_path, "--help")
    assert "rehearse" in done.stdout
    assert run_installed(installed, tmp_path, "grpo", "--help").stdout.startswith("usage")


def test_pip_installs_the_files_of_the_report(installed, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "actor/loss": 0.5}\n')
    run_installed(installed, tmp_path, "report", "run")
    assert "<html" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def run_installed(installed, folder, *arguments):
    """Run `r1v2` of an installed package, away from the repository."""
    return subprocess.run(
        [sys.executable, str(installed / "bin" / "r1v2"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )


def test_make_install_says_that_it_takes_minutes_and_does_it_once(tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@" >> "$0.calls"\n')
    python.chmod(0o755)
    command = ["make", "--no-print-directory", "-C", str(ROOT), "install", f"VENV={tmp_path / 'venv'}"]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert first.stdout.startswith(f"installing requirements.lock into {tmp_path / 'venv'}: gigabytes, minutes")
    calls = python.with_name("python.calls")
    assert [line.split()[:3] for line in calls.read_text().splitlines()] == [["-m", "pip", "install"]] * 2
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""
    assert len(calls.read_text().splitlines()) == 2
