"""The common part of tests of whole runs: settings, a process to run in or to kill, and the content of checkpoints."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from torch.distributed import TCPStore
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_r1v2.checkpoint.megatron.run_folder import finished_checkpoints
from megatron_r1v2.config.choices import StageName
from megatron_r1v2.config.load import load_recipe, load_recipe_as, recipe_yaml
from megatron_r1v2.config.recipes import EvaluateRecipe, Recipe
from megatron_r1v2.monitoring.metrics import find_metric
from megatron_r1v2.resilience.files import write_file
from megatron_r1v2.stages.align import run_align
from megatron_r1v2.stages.grpo.stage import run_grpo
from megatron_r1v2.stages.mpo import run_mpo
from megatron_r1v2.stages.reward_model import run_reward_model
from tests.ranks import enter_rank, forked_context, free_port
from tests.stages.tiny_run import tiny_recipe

_STAGES = {
    StageName.grpo: run_grpo,
    StageName.align: run_align,
    StageName.mpo: run_mpo,
    StageName.reward_model: run_reward_model,
}


def recipe_for(root: Path, output: Path, overrides: tuple[str, ...] = (), *, stage: str = "grpo") -> Recipe:
    """Return the settings of a small run on the model and data below `root`, changed as a command line would.

    Args:
        root: of `tiny_recipe`.
        output: the run's folder; its recipe is written beside it.
        overrides: `section.key=value`.
        stage: that it is for; or "evaluate", with the recipe of grpo.
    """
    recipe = tiny_recipe(root, stage="grpo" if stage == "evaluate" else stage)
    # Ranks of one test would write the same file at the same time.
    rank = os.environ.get("RANK", "0")
    file = output.with_name(f"{output.name}.yaml" if rank == "0" else f"{output.name}-{rank}.yaml")
    write_file(file, recipe_yaml(recipe.changed(run=recipe.run.changed(output_dir=str(output)))))
    return load_recipe_as(EvaluateRecipe, file, overrides) if stage == "evaluate" else load_recipe(file, overrides)


def run_stage(recipe: Recipe) -> Path:
    """Run a stage in this process, and leave no gloo threads behind: they poll for ever."""
    try:
        return _STAGES[recipe.stage](recipe)
    finally:
        gc.collect()


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Return the lines of a run's metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "settings_changed" not in line]
    unknown = {name for line in lines for name in line if name != "step" and find_metric(name) is None}
    assert not unknown, f"not in megatron_r1v2/monitoring/metrics.py: {unknown}"
    return lines


def read_rollouts(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's sample rollouts."""
    return [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]


def without_timings(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return metrics less those that depend on the clock."""
    return [
        {
            k: v
            for k, v in line.items()
            if not k.startswith(("timing_s/", "perf/", "preemption/", "rollout/wait_s/", "memory_gib/"))
        }
        for line in lines
    ]


def checkpoint_contents(folder: Path) -> dict[str, Any]:
    """Return everything that a checkpoint holds but the settings, in this process and without process groups."""
    reader = FileSystemReader(folder / "tensors")
    tensors: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=reader, no_dist=True)
    common = dist_checkpointing.load_common_state_dict(str(folder / "tensors"))
    beside = {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))}
    return {"tensors": tensors, "common": common, **beside}


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries, lists and tuples by their path."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {name: value}
    return {path: leaf for key, item in items for path, leaf in flatten(item, f"{name}/{key}").items()}


def differences(one: Any, other: Any) -> list[str]:
    """Return the paths at which two nested values differ in any bit."""
    ours, theirs = flatten(one), flatten(other)
    unequal = [name for name in ours.keys() & theirs.keys() if not _same(ours[name], theirs[name])]
    return sorted([*unequal, *(ours.keys() ^ theirs.keys())])


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def last_checkpoint(run: Path) -> Path:
    """Return the newest finished checkpoint of a run."""
    return finished_checkpoints(run / "checkpoints")[-1]


def assert_same_end(run: Path, reference: Path, *, rounded: bool = False) -> None:
    """Compare weights, optimizer, buffer, data position, random states, metrics and rollouts, bit for bit.

    Args:
        run: that was interrupted.
        reference: that was not.
        rounded: the engine's log-probs are compared to rounding. With data parallelism, which replica takes which
            prompt from the shared queue is a matter of time, and so is with what a response is batched; and a step that
            goes on with what it had generated before an interruption has smaller batches.
    """
    ours, theirs = checkpoint_contents(last_checkpoint(run)), checkpoint_contents(last_checkpoint(reference))
    our_lines, their_lines = without_timings(read_metrics(run)), without_timings(read_metrics(reference))
    if rounded:
        assert_close(take(ours, "rollout_log_probs"), take(theirs, "rollout_log_probs"))
        for name in ("rollout_corr/", "token_mult_prob_error"):
            assert_close(take(our_lines, name), take(their_lines, name))
    assert differences(ours, theirs) == []
    assert differences(our_lines, their_lines) == []
    if not rounded:  # those of the main rank, whichever they were
        assert read_rollouts(run) == read_rollouts(reference)


def take(contents: Any, part: str) -> dict[str, float]:
    """Remove the leaves whose key has a part in it, and return them by their path."""
    taken = {}
    for key, value in list(contents.items() if isinstance(contents, dict) else enumerate(contents)):
        if isinstance(key, str) and part in key:
            taken |= flatten(contents.pop(key), key)
        elif isinstance(value, dict | list):
            taken |= {f"{key}/{path}": leaf for path, leaf in take(value, part).items()}
    return taken


def assert_close(ours: dict[str, float], theirs: dict[str, float]) -> None:
    """Compare leaves by their path, to rounding."""
    assert len(ours) > 0
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def has_line(run: Path, file: str, step: int) -> bool:
    """Return whether a file of lines has one of this step."""
    path = run / file
    return path.is_file() and f'{{"step": {step},' in path.read_text()


class Ranks:
    """A run in processes of its own: they may be killed, and start fast, since a server has imported everything."""

    def __init__(self, recipe: Recipe, world_size: int = 1) -> None:
        """Start the processes.

        Args:
            recipe: the settings.
            world_size: processes.
        """
        output = Path(recipe.run.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        file = output.with_name(output.name + ".started.yaml")
        write_file(file, recipe_yaml(recipe))
        self.log = output.with_name(output.name + ".log")
        self.log.write_text("")
        context = forked_context()
        port = self._port = free_port()
        self.processes = [
            context.Process(target=_rank_main, args=(rank, world_size, port, str(file), str(self.log)))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def kill(self) -> None:
        """End every rank by SIGKILL, as an out-of-memory killer or a lost node does."""
        for process in self.processes:
            process.kill()
        self._end()

    def kill_when(self, condition: Callable[[], bool], *, seconds: float = 120.0) -> None:
        """Kill as soon as the condition holds.

        Args:
            condition: asked a thousand times a second.
            seconds: after which the test fails.
        """
        self.wait_until(condition, seconds)
        self.kill()

    def send_when(self, number: int, condition: Callable[[], bool], *, seconds: float = 120.0) -> None:
        """Send a signal to the last rank as soon as the condition holds."""
        self.wait_until(condition, seconds)
        os.kill(self.processes[-1].pid, number)

    def wait(self, seconds: float = 120.0) -> str:
        """Wait for the end of a run that is to succeed; returns what it printed to stderr."""
        deadline = time.monotonic() + seconds
        while any(process.is_alive() for process in self.processes) and time.monotonic() < deadline:
            if any(process.exitcode for process in self.processes):
                break
            time.sleep(0.02)
        codes = [process.exitcode for process in self.processes]
        self.kill()
        assert codes == [0] * len(codes), f"exit codes {codes}:\n{self.log.read_text()}"
        return self.log.read_text()

    def phase_of(self, rank: int) -> str:
        """Return what a rank has last told the others that it is doing; there must be others."""
        store = TCPStore("127.0.0.1", self._port, is_master=False, timeout=timedelta(seconds=60))
        return json.loads(store.get(f"default_pg/0//watch/rank-{rank}"))["phase"]

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait for something while the run goes on; the test fails when it ends, or after so many seconds."""
        deadline = time.monotonic() + seconds
        while not condition():
            alive = all(process.is_alive() for process in self.processes)
            if not alive or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the run ended or hung before its time:\n{self.log.read_text()}")
            time.sleep(0.001)

    def _end(self) -> None:
        for process in self.processes:
            process.join()
            # What the rank had started (a checkpoint writer, verifiers) is in its process group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _rank_main(rank: int, world_size: int, port: int, file: str, log: str) -> None:
    os.setpgid(0, 0)
    enter_rank(rank, world_size, port)
    with Path(log).open("a", buffering=1) as stderr, contextlib.redirect_stderr(stderr):
        try:
            run_stage(load_recipe(file))
        except BaseException:
            traceback.print_exc()
            stderr.flush()
            os._exit(1)
    os._exit(0)
