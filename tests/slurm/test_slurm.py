"""The sbatch scripts as they are, on a real SLURM cluster of two nodes: to the end, preempted, warned, a node lost."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_r1v2.checkpoint.megatron.run_folder import finished_checkpoints
from tests.checkpoint.test_destinations import assert_same_weights
from tests.examples.small_chain import write_chain
from tests.slurm.cluster import NODES, Cluster, why_not
from tests.stages.runs import Ranks, assert_same_end, differences, last_checkpoint, read_metrics, recipe_for
from tests.stages.tiny_run import tiny_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

ROOT = Path(__file__).parents[2]
STEPS = 5
SETTINGS = (
    f"train.steps={STEPS}",
    "generation.max_response_tokens=48",
    "generation.max_requests=8",
    "buffer.target_effective_fraction=0.95",
)
TENSOR_PARALLEL = ("parallel.tensor=2", "parallel.sequence=true", "train.parts=[adapter, language]")
# Prompts one after the other, so that a signal comes between them; as the 38B recipes save.
ONE_BY_ONE = ("generation.max_requests=4", "checkpoint.asynchronous=true")


def environment() -> dict[str, str]:
    """Return what a user of this installation would have set in the shell that submits."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    with Cluster(folder) as started:
        yield started
    shutil.rmtree(folder)


class Job:
    """slurm/grpo_38b.sh with a tiny recipe, on two nodes of one process each."""

    def __init__(
        self,
        cluster: Cluster,
        root: Path,
        run: Path,
        overrides: tuple[str, ...] = (),
        options: tuple[str, ...] = (),
        **variables: str,
    ) -> None:
        recipe_for(root, run)
        self.cluster = cluster
        self.run = run
        self.output = run.with_name("job.log")
        self.logs = run.with_name("logs")
        self.number = cluster.submit(
            "slurm/grpo_38b.sh",
            *SETTINGS,
            *overrides,
            options=("--nodes=2", "--gpus-per-node=1", f"--output={self.output}", f"--chdir={ROOT}", *options),
            R1V2_RECIPE=str(run.with_name(run.name + ".yaml")),
            R1V2_LOGS=str(self.logs),
            **{**environment(), **variables},
        )

    @property
    def log(self) -> str:
        return self.output.read_text() if self.output.is_file() else ""

    @property
    def rank_logs(self) -> str:
        """Return what all ranks of all starts have written to stderr, also when their torchrun was gone by then."""
        return "".join(path.read_text() for path in sorted(self.logs.rglob("stderr.log")))

    def wait_for_rollouts(self, step: int) -> None:
        """Wait until the step after `step` has generated something, or a later one has."""

        def begun() -> bool:
            state = self.cluster.job(self.number)["JobState"]
            assert state in ("PENDING", "RUNNING", "CONFIGURING"), f"{state}: {self.log}"
            folders = sorted((self.run / "unfinished").glob("step-*"))
            return bool(folders) and folders[-1].name >= f"step-{step:08d}" and any(folders[-1].glob("*.pt"))

        self.cluster.wait_until(begun, f"rollouts of step {step + 1}", seconds=400)

    def wait_for_success(self) -> dict[str, str]:
        told = self.cluster.wait_for_end(self.number, seconds=600)
        assert told["JobState"] == "COMPLETED", self.log
        assert [line["step"] for line in read_metrics(self.run)] == list(range(1, STEPS + 1))
        return told


@pytest.fixture(scope="module")
def finished(cluster: Cluster, root: Path, tmp_path_factory) -> Job:
    """Return a data-parallel job that nothing interrupted."""
    job = Job(cluster, root, tmp_path_factory.mktemp("finished") / "run")
    assert job.wait_for_success()["Restarts"] == "0"
    return job


def assert_same_course(run: Path, reference: Path) -> None:
    """Compare data position, schedule and counters.

    Not the bits (tests/faults does that): which replica takes which prompt is a matter of time, and so is how the
    engine rounds.
    """
    ours, theirs = (torch.load(last_checkpoint(path) / "state.pt", weights_only=True) for path in (run, reference))
    for name in ("step", "version", "stream", "scheduler", "trained"):
        assert differences(ours[name], theirs[name]) == [], name
    our_lines, their_lines = read_metrics(run), read_metrics(reference)
    for name in ("data/samples_read", "rollout/responses", "actor/lr"):
        assert [line[name] for line in our_lines] == [line[name] for line in their_lines]


def test_a_job_of_two_nodes_runs_to_its_end_and_keeps_the_logs_of_its_ranks(finished: Job) -> None:
    assert "report: " in finished.log
    for node in (0, 1):
        folder = finished.logs / f"r1v2-grpo-{finished.number}" / "start-0" / f"node-{node}"
        assert [path.parent.name for path in folder.rglob("stderr.log")] == ["0"]


@pytest.fixture(scope="module")
def tensor_parallel(root: Path, tmp_path_factory) -> Path:
    """Return what two tensor-parallel ranks end with that know nothing of SLURM and of interruptions."""
    run = tmp_path_factory.mktemp("tensor") / "run"
    Ranks(recipe_for(root, run, (*SETTINGS, *TENSOR_PARALLEL)), 2).wait(seconds=900)
    return run


def test_tensor_parallel_ranks_on_two_nodes_end_with_the_bits_of_two_on_one(
    cluster: Cluster, root: Path, tmp_path: Path, tensor_parallel: Path
) -> None:
    job = Job(cluster, root, tmp_path / "run", TENSOR_PARALLEL)
    job.wait_for_success()
    assert_same_end(job.run, tensor_parallel, rounded=True)


def preempt(cluster: Cluster, job: Job) -> tuple[int, int, int]:
    """Preempt a job; returns what it has left: the step that was begun, the newest checkpoint, prompts kept."""
    log = job.run.with_name("urgent.log")
    options = ("--partition=urgent", "--nodes=2", "--exclusive", f"--output={log}", f"--chdir={ROOT}")
    urgent = cluster.submit("tests/slurm/short_job.sh", options=options)
    assert cluster.wait_for_end(urgent)["JobState"] == "COMPLETED"
    assert cluster.job(job.number)["JobState"] == "PENDING", job.log
    newest = finished_checkpoints(job.run / "checkpoints")[-1].name
    kept = list((job.run / "unfinished" / newest).glob("*.pt"))
    return read_metrics(job.run)[-1]["step"] + 1, int(newest.removeprefix("step-")), len(kept)


@pytest.mark.parametrize(("layout", "prompts"), [((), 12), (TENSOR_PARALLEL, 6)], ids=["dp2", "tp2"])
def test_preemption_in_a_step_costs_that_step_and_not_its_finished_rollouts(
    cluster: Cluster, root: Path, tmp_path: Path, layout: tuple[str, ...], prompts: int
) -> None:
    settings = (*ONE_BY_ONE, f"train.prompts_per_step={prompts}", *layout)
    job = Job(cluster, root, tmp_path / "run", settings)
    newest, kept, preemptions = 1, 0, 0
    while not kept:  # nearly all of the time goes into rollouts, but SIGTERM may come between two steps, too
        job.wait_for_rollouts(newest)
        begun, newest, kept = preempt(cluster, job)
        preemptions += 1
        assert begun == newest + 1, "a step that was done is lost"
        cluster.start_now(job.number)
    assert job.wait_for_success()["Restarts"] == str(preemptions)
    assert f"step {begun} is abandoned, as asked by SIGTERM; finished rollouts are kept" in job.log
    assert f"interrupted; back into the queue, start over {preemptions} of at most 100" in job.log
    assert f"step-{newest:08d}, step {newest} of {STEPS}" in job.log
    assert f"step {begun}: rollouts of {kept} of {prompts} prompts are there from before" in job.log
    print(f"preempted in step {begun}: resumed from {newest}, {kept} of {prompts} prompts not generated again")
    Ranks(recipe_for(root, tmp_path / "reference", (*SETTINGS, *settings)), 2).wait(seconds=900)
    assert_same_end(job.run, tmp_path / "reference", rounded=True)


def test_a_warned_job_saves_and_is_put_back_within_the_bound(
    cluster: Cluster, root: Path, tmp_path: Path, finished: Job
) -> None:
    job = Job(cluster, root, tmp_path / "run", R1V2_MAX_REQUEUES="1")
    job.wait_for_rollouts(0)
    cluster.warn(job.number)
    cluster.wait_until(lambda: "start over 1 of at most 1" in job.log, "start over", seconds=400)
    assert "asked to stop by SIGUSR1: saving after step" in job.log
    assert job.wait_for_success()["Restarts"] == "1"
    assert_same_course(job.run, finished.run)


def test_a_job_is_not_put_back_beyond_the_bound(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    job = Job(cluster, root, tmp_path / "run", R1V2_MAX_REQUEUES="0")
    job.wait_for_rollouts(0)
    cluster.warn(job.number)
    assert cluster.wait_for_end(job.number)["JobState"] == "FAILED"
    assert "R1V2_MAX_REQUEUES=0 starts over are used up; submit again to go on" in job.log


def test_a_job_that_loses_a_node_goes_on_when_there_are_enough_again(
    cluster: Cluster, root: Path, tmp_path: Path, finished: Job
) -> None:
    job = Job(cluster, root, tmp_path / "run", R1V2_RETRY_AFTER="1")
    job.wait_for_rollouts(1)
    cluster.kill_node(NODES[1])
    try:
        cluster.wait_until(lambda: cluster.job(job.number)["JobState"] != "RUNNING", "end of the start", seconds=500)
    finally:
        cluster.start_node(NODES[1])
    assert "where the ranks were:" in job.rank_logs
    assert "back into the queue, start over 1" in job.log
    assert job.wait_for_success()["Restarts"] == "1"
    assert "resuming from" in job.log
    assert_same_course(job.run, finished.run)


def test_a_job_that_fails_at_once_is_not_put_back(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    job = Job(cluster, root, tmp_path / "run", ("train.learning_rate=-1",))
    assert cluster.wait_for_end(job.number)["JobState"] == "FAILED"
    assert "train.learning_rate=-1 is out of range; accepted: 0 or more" in job.log
    assert cluster.job(job.number)["Restarts"] == "0"


def test_the_38b_chain_runs_to_its_export_each_job_after_the_one_before(cluster: Cluster, tmp_path: Path) -> None:
    """The pipeline script with the sbatch scripts and recipes of the 38B model; their sizes are those of a tiny one."""
    write_chain(tmp_path)
    submitted = subprocess.run(
        ["bash", str(tmp_path / "slurm" / "pipeline_38b.sh"), "--nodes=1", "--gpus-per-node=1"],
        env={**cluster.environment, **environment()},
        capture_output=True,
        text=True,
        check=True,
    )
    jobs = dict(re.findall(r"^(\w+): job (\d+)$", submitted.stdout, re.MULTILINE))
    assert list(jobs) == ["align", "pairs", "mpo", "grpo", "evaluate", "export"]
    for stage, number in jobs.items():
        told = cluster.wait_for_end(int(number))
        logs = "".join(path.read_text() for path in tmp_path.glob(f"*-{number}.log"))
        assert told["JobState"] == "COMPLETED", f"{stage}: {logs}"
    assert (tmp_path / "runs" / "r1v2-38b-grpo" / "evaluation-evaluation.json").is_file()
    assert (tmp_path / "checkpoints" / "r1v2-38b-trained" / "model.safetensors").is_file()


class Conversion:
    """slurm/convert_38b.sh with a tool of checkpoint_tools/ and its arguments."""

    def __init__(self, cluster: Cluster, log: Path, tool: str, *arguments: str | Path) -> None:
        self.cluster = cluster
        self.output = log
        self.number = cluster.submit(
            "slurm/convert_38b.sh",
            *map(str, arguments),
            options=(f"--output={log}", f"--chdir={ROOT}"),
            R1V2_TOOL=tool,
            **environment(),
        )

    def wait_for_success(self) -> dict[str, str]:
        told = self.cluster.wait_for_end(self.number)
        assert told["JobState"] == "COMPLETED", self.output.read_text()
        return told


def test_the_conversion_job_converts_there_and_back_and_is_put_back_when_time_is_up(
    cluster: Cluster, root: Path, tmp_path: Path
) -> None:
    hf, megatron = root / "model", tmp_path / "megatron"
    there = Conversion(cluster, tmp_path / "there.log", "hf_to_megatron", "--hf", hf, "--output", megatron)
    cluster.wait_until(lambda: cluster.steps(there.number) != [], "step of the conversion")
    cluster.warn(there.number)
    assert there.wait_for_success()["Restarts"] == "1"
    assert "out of time; back into the queue, start over 1 of at most 100" in there.output.read_text()
    back = ("--checkpoint", megatron, "--output", tmp_path / "hf")
    Conversion(cluster, tmp_path / "back.log", "megatron_to_hf", *back).wait_for_success()
    assert_same_weights(hf, tmp_path / "hf")


def test_a_conversion_job_that_fails_says_so_and_is_not_put_back(cluster: Cluster, tmp_path: Path) -> None:
    missing = ("--hf", tmp_path / "nothing", "--output", tmp_path / "megatron")
    job = Conversion(cluster, tmp_path / "job.log", "hf_to_megatron", *missing)
    told = cluster.wait_for_end(job.number)
    assert (told["JobState"], told["Restarts"]) == ("FAILED", "0")
    assert f"{tmp_path}/nothing" in job.output.read_text()


STUB = """#!/usr/bin/env bash
# In the place of a trainer: on its first start as STUB says, later done at once.
trap "$STUB" TERM
[[ -n ${SLURM_RESTART_COUNT:-} ]] || for _ in {1..2000}; do sleep 0.2; done
"""


def stub_job(cluster: Cluster, root: Path, folder: Path, *options: str, stub: str = "exit 1", **variables: str) -> Job:
    """Return slurm/grpo_38b.sh as it is, on one node, with a torchrun that has nothing to train."""
    folder.mkdir()
    (folder / "torchrun").write_text(STUB)
    (folder / "torchrun").chmod(0o755)
    path = f"{folder}:{environment()['PATH']}"
    return Job(cluster, root, folder / "run", options=options, PATH=path, STUB=stub, **variables)


def test_a_step_that_is_longer_than_the_warning_is_given_up_in_time_and_the_job_put_back(
    cluster: Cluster, root: Path, tmp_path: Path
) -> None:
    """Also where its tasks do not end on SIGTERM. Into the time limit for real: two minutes."""
    limits = ("--nodes=1", "--time=2", "--signal=B:USR1@75")
    jobs = [
        stub_job(cluster, root, tmp_path / name, *limits, stub=stub, R1V2_LAST_SECONDS="45", R1V2_RETRY_AFTER="9999")
        for name, stub in (("ends", "echo given up; exit 1"), ("deaf", "echo deaf"))
    ]
    for job in jobs:
        told = cluster.wait_for_end(job.number)
        assert (told["JobState"], told["Restarts"]) == ("COMPLETED", "1"), job.log
        assert "out of time in a step; back into the queue, start over 1 of at most 100" in job.log
    assert "given up" in jobs[0].log
    assert "deaf" in jobs[1].log


def test_starts_that_slurm_itself_makes_count_for_the_bound(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    job = stub_job(cluster, root, tmp_path / "job", "--nodes=1", R1V2_MAX_REQUEUES="0")
    cluster.wait_until(lambda: cluster.steps(job.number) != [], "step")
    cluster.requeue(job.number)
    told = cluster.wait_for_end(job.number)
    assert (told["JobState"], told["Restarts"]) == ("FAILED", "1"), job.log
    assert "put back by SLURM, but R1V2_MAX_REQUEUES=0 starts over are used up; submit again to go on" in job.log
    assert cluster.steps(job.number) == []
