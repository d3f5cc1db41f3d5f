"""The checkpoints of a run: weights and optimizer in megatron-core's torch_dist format, everything else beside them.

A checkpoint is a folder `step-00000020`:

    tensors/                                 trained weights and optimizer state (torch_dist); any layout loads them
    state.pt                                 step, data position, buffer index, scheduler, counters
    replay-D.pt                              the buffer's samples that data-parallel rank D holds
    rng-R.pt                                 random states of rank R
    recipe.yaml                              the settings of the run
    checkpoint_manifest.json                 size and checksum of every other file (see manifest.py)

Beside them `best.json` names the one with the best validation Pass@1: {"step": 20, "pass_at_1": 0.71}.

It is written as `.step-00000020.partial` and renamed when every rank is done, so what has the final name is whole. One
that has been damaged since is renamed `step-00000020.damaged` when a run goes on from the one before.
Parts of the model that do not train are not in it: they are in the model that the run started from.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_r1v2.checkpoint.megatron.run_folder import (
    RECIPE_FILE,
    TENSORS,
    finished_checkpoints,
    load_state,
    save_state,
)
from megatron_r1v2.config.choices import Part
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel import objects
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.resilience.files import (
    delete_folder,
    partial_path,
    publish_folder,
    put_aside,
    remove_leftovers,
    start_folder,
    write_file,
)
from megatron_r1v2.training.manifest import check_manifest, write_run_manifest
from megatron_r1v2.training.optimizer import (
    OPTIMIZER_FORMAT,
    load_optimizer_state,
    sharded_optimizer_state,
    trains_here,
)
from megatron_r1v2.training.part_state import check_shapes, fill, part_names, part_state
from megatron_r1v2.training.random_states import random_states, restore_random_states

logger = logging.getLogger(__name__)

BEST_FILE = "best.json"


@dataclass(frozen=True)
class Snapshot:
    """Everything that a run needs to go on, beside weights and optimizer."""

    step: int
    """Steps done."""
    parts: Collection[Part]
    """Those that differ from the HF model that the run started from; saved here."""
    trained: Collection[Part]
    """Those that this stage trains."""
    state: Mapping[str, object]
    """The same on every rank; tensors, numbers, strings, and lists and dictionaries of them."""
    replay: Mapping[str, object]
    """What this data-parallel rank holds of the buffer."""
    recipe: str
    """The settings of the run, as YAML."""
    pass_at_1: float | None = None
    """Of this step on the validation split; None: it was not validated."""
    random_parts: Collection[Part] = ()
    """Those of `parts` whose weights were drawn and never trained."""


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, keep_last: int, asynchronous: bool, context: ParallelContext) -> None:
        """Collective over the world: open the folder.

        Args:
            keep_last: older ones are deleted after each save, but for the best.
        """
        self.folder = folder
        self.keep_last = keep_last
        self.asynchronous = asynchronous
        self.context = context
        if context.is_main and folder.is_dir():
            remove_leftovers(folder, "step-*")  # half-written checkpoints of an interrupted run, and half-deleted ones
        # A persistent worker process hangs in megatron-core 0.16.1.
        self._queue = AsyncCallsQueue(persistent=False)
        self._written: tuple[Path, float | None, list[str]] | None = None
        best = [_read_best(folder)]
        dist.broadcast_object_list(best, src=0)
        self._best_pass_at_1 = best[0][1] if best[0] is not None else None

    def agree_on_newest_undamaged(self) -> Path | None:
        """Collective over the world: choose the newest checkpoint whose files are as they were written.

        Newer ones that are damaged are put aside, and said in the log.

        Returns:
            The same on every rank; None: there is no checkpoint.

        Raises:
            RuntimeError: there are checkpoints, and all are damaged.
        """
        finished = objects.all_gather(finished_checkpoints(self.folder))[0]
        damaged: list[tuple[Path, str]] = []
        for folder in reversed(finished):
            damage = check_manifest(folder)
            if damage is None:
                self._put_aside(damaged, folder)
                return folder
            damaged.append((folder, damage))
        if damaged:
            message = "; ".join(f"{folder.name}: {damage}" for folder, damage in damaged)
            raise RuntimeError(
                f"every checkpoint in {self.folder} is damaged ({message}); bring one back from a copy, or set "
                "run.output_dir to a new folder to start anew"
            )
        return None

    def put_aside_after(self, step: int) -> None:
        """Collective over the world: rename the checkpoints that are newer than that of a step.

        Raises:
            ValueError: the step has no checkpoint.
        """
        steps = {_step_of(folder): folder for folder in objects.all_gather(finished_checkpoints(self.folder))[0]}
        if step not in steps:
            raise ValueError(
                f"checkpoint.resume_step={step}: {self.folder} has no checkpoint of that step; it has "
                f"{', '.join(map(str, sorted(steps))) or 'none'}"
            )
        dist.barrier()
        for other, folder in steps.items() if self.context.is_main else ():
            if other > step:
                put_aside(folder, "left")
                logger.warning("checkpoint %s is put aside: going on from step %d", folder, step)
        dist.barrier()

    def newest_step(self) -> int:
        """Return the step of the newest finished checkpoint; 0: there is none."""
        finished = finished_checkpoints(self.folder)
        return int(finished[-1].name.removeprefix("step-")) if finished else 0

    def _put_aside(self, damaged: Iterable[tuple[Path, str]], instead: Path) -> None:
        """Collective over the world: rename damaged checkpoints."""
        dist.barrier()
        for folder, damage in damaged if self.context.is_main else ():
            put_aside(folder, "damaged")
            logger.warning("checkpoint %s is damaged (%s): going on from %s", folder, damage, instead.name)
        dist.barrier()

    def is_best(self, pass_at_1: float | None) -> bool:
        """Return whether a validation is better than that of every checkpoint.

        Args:
            pass_at_1: the result; None: nothing was validated.
        """
        return pass_at_1 is not None and (self._best_pass_at_1 is None or pass_at_1 > self._best_pass_at_1)

    def forget_best(self) -> None:
        """Collective over the world: compare no validation to come with the earlier ones, made in another way."""
        if self._best_pass_at_1 is None:
            return
        dist.barrier()  # each rank has read the file when it opened the folder
        if self.context.is_main:
            aside = (self.folder / BEST_FILE).rename(self.folder / f"{BEST_FILE}.left")
            message = "the best validation so far, %s, was made in another way: its checkpoint is kept as others are"
            logger.warning(message, aside.read_text(encoding="utf-8").strip())
        self._best_pass_at_1 = None
        dist.barrier()

    def save(self, model: R1V2Model, optimizer: MegatronOptimizer, snapshot: Snapshot) -> Path:
        """Collective over the world: save everything that a run needs to go on.

        Returns:
            The folder that the checkpoint will have when `finish_pending` finds it finished.
        """
        # One checkpoint in flight: they get their names in order.
        self.finish_pending(blocking=True)
        pass_at_1, random_parts = snapshot.pass_at_1, part_names(snapshot.random_parts)
        if self.is_best(pass_at_1):
            self._best_pass_at_1 = pass_at_1
        target = self.folder / f"step-{snapshot.step:08d}"
        partial = partial_path(target)
        with _explain_write_errors(self.folder):
            self._write_small_files(target, snapshot)
            sharded: ShardedStateDict = {"model": part_state(model, snapshot.parts)}
            if trains_here(optimizer):
                sharded["optimizer"] = sharded_optimizer_state(optimizer, sharded["model"])
            request = dist_checkpointing.save(sharded, str(partial / TENSORS), async_sharded_save=self.asynchronous)
            dist.barrier()  # published when every rank has written, not this one alone
        if request is None:
            self._written = (target, pass_at_1, random_parts)
        else:
            request.add_finalize_fn(lambda: self._publish(target, pass_at_1, random_parts))
            self._queue.schedule_async_request(request)
        return target

    def _write_small_files(self, target: Path, snapshot: Snapshot) -> None:
        """Collective over the world: make a folder for a checkpoint, with all but the tensors."""
        partial = partial_path(target)
        if self.context.is_main:
            start_folder(target)
            (partial / TENSORS).mkdir()
        dist.barrier()
        if self.context.is_main:
            names = {"parts": part_names(snapshot.parts), "trained": part_names(snapshot.trained)}
            save_state(partial, {**snapshot.state, **names})
            write_file(partial / RECIPE_FILE, snapshot.recipe)
        if self.context.is_replica_leader:
            torch.save(dict(snapshot.replay), partial / f"replay-{self.context.data_rank}.pt")
        torch.save(random_states(), partial / f"rng-{dist.get_rank()}.pt")

    def written(self) -> int | None:
        """Return the number of a background save whose files this rank has written and nobody has published."""
        for call in self._queue.async_calls:
            if call.async_caller.is_current_async_call_done(blocking=False, no_dist=True):
                return int(call.idx)
        return None

    def finish_pending(self, *, blocking: bool) -> None:
        """Collective over the world: give checkpoints that are written their final name."""
        with _explain_write_errors(self.folder):
            self._queue.maybe_finalize_async_calls(blocking=blocking)
            if self._written is not None:
                self._publish(*self._written)
                self._written = None

    def load(
        self, folder: Path, model: R1V2Model, optimizer: MegatronOptimizer, *, trained: Iterable[Part]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Collective over the world: load a checkpoint into model and optimizer.

        Args:
            folder: a finished checkpoint.
            trained: the parts that the run trains; must be those of the checkpoint.

        Returns:
            What `save` was given as `state`, and the `replay` of every data-parallel rank of the saved run.

        Raises:
            ValueError: the checkpoint trained other parts.
        """
        state = load_state(folder)
        if state["trained"] != part_names(trained):
            raise ValueError(
                f"checkpoint {folder} trained {state['trained']} but train.parts={part_names(trained)}; to start "
                "another stage from its weights set model.checkpoint to it and run.output_dir to a new folder"
            )
        sharded: ShardedStateDict = {"model": part_state(model, [Part(name) for name in state["parts"]])}
        check_shapes(sharded["model"], folder)
        if trains_here(optimizer):
            # is_loading: each rank asks for what it needs; otherwise all would be sent everything.
            sharded["optimizer"] = optimizer.sharded_state_dict(
                sharded["model"], is_loading=True, metadata=OPTIMIZER_FORMAT
            )
        loaded = dist_checkpointing.load(sharded, str(folder / TENSORS))
        fill(model, loaded["model"] if sharded["model"] else {}, folder)  # a later stage may have none of the parts
        if trains_here(optimizer):
            load_optimizer_state(optimizer, loaded["optimizer"])
        restore_random_states(folder / f"rng-{dist.get_rank()}.pt")
        # By number: by name, rank 10 would come before rank 2.
        shards = sorted(folder.glob("replay-*.pt"), key=lambda path: int(path.stem.split("-")[1]))
        return state, [torch.load(path, weights_only=True) for path in shards]

    def _publish(self, target: Path, pass_at_1: float | None, random_parts: Collection[str]) -> None:
        """Collective over the world: give a checkpoint that every rank has written its name, delete the oldest."""
        write_run_manifest(partial_path(target), random_parts=random_parts)
        if not self.context.is_main:
            return
        publish_folder(target)
        # Only now: best.json must not name a checkpoint that does not exist.
        best = _read_best(self.folder)
        if pass_at_1 is not None and (best is None or pass_at_1 > best[1]):
            best = (target, pass_at_1)
            content = {"step": _step_of(target), "pass_at_1": pass_at_1}
            write_file(self.folder / BEST_FILE, json.dumps(content) + "\n")
        for old in finished_checkpoints(self.folder)[: -self.keep_last]:
            if best is not None and old == best[0]:
                continue
            delete_folder(old)


@contextmanager
def _explain_write_errors(folder: Path) -> Iterator[None]:
    """Turn a failed write (a full disk, a rank that is gone) into an error that says what to do."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
        free = shutil.disk_usage(existing).free / 2**20
        raise RuntimeError(
            f"a checkpoint could not be written to {folder}, where {free:.0f} MiB are free. The finished ones are as "
            "they were: start again, and where the disk is full make room before (or lower checkpoint.keep_last). The "
            f"cause: {error}"
        ) from error


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _read_best(folder: Path) -> tuple[Path, float] | None:
    """Return the best checkpoint that was evaluated, while it is there, and its validation Pass@1."""
    path = folder / BEST_FILE
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    checkpoint = folder / f"step-{content['step']:08d}"
    return (checkpoint, content["pass_at_1"]) if checkpoint.is_dir() else None


def load_weights(model: R1V2Model, folder: Path) -> list[Part]:
    """Collective over the world: load the parts that a checkpoint holds; the rest of the model stays as it is.

    Raises:
        ValueError: the checkpoint is of a reward model and the model is a policy, or the sizes differ.
    """
    parts = [Part(name) for name in load_state(folder)["parts"]]
    if Part.score in parts and not model.is_reward_model:
        raise ValueError(
            f"checkpoint {folder} is of a reward model, which cannot go on as a policy; to score responses with it set "
            "reward_model.checkpoint to it, and model.checkpoint to a checkpoint of another stage"
        )
    sharded = part_state(model, parts)
    check_shapes(sharded, folder)
    loaded = dist_checkpointing.load({"model": sharded}, str(folder / TENSORS))
    fill(model, loaded["model"] if sharded else {}, folder)  # a later stage may have none of the parts
    return parts
