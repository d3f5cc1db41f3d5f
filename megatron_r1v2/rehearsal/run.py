"""The rehearsal of a recipe: a process for each rank, and what they found together, beside the plan."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO

from megatron_r1v2.config.choices import Part, Recompute, StageName
from megatron_r1v2.config.recipes import PairsRecipe, TrainingRecipe
from megatron_r1v2.planning.memory import RankMemory, fp8_copies, plan_memory
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.planning.plan import Plan
from megatron_r1v2.planning.roofline import (
    adapter_flops,
    head_flops,
    language_layer_flops,
    training_tokens,
    vision_flops,
)
from megatron_r1v2.planning.workload import RehearsedStep
from megatron_r1v2.rehearsal.collectives import find_mismatches
from megatron_r1v2.rehearsal.ledger import PhaseMemory
from megatron_r1v2.rehearsal.preparation import STEPS, VALIDATED_PROMPTS, Step, write_rehearsal
from megatron_r1v2.rehearsal.rank import PHASE_FILE, RankResult, RankSpec

_LOG_LINES = 20
_BEFORE = "before its start"
TELL_SECONDS = 30.0
"""From one line about the phases to the next."""


@dataclass(frozen=True)
class Rehearsal:
    """The findings of all rehearsed ranks."""

    plan: Plan
    ranks: tuple[RankResult, ...]
    mismatches: tuple[str, ...]
    step: Step
    changes: tuple[str, ...] = ()
    """Settings that the rehearsal has changed."""
    data: tuple[str, ...] = ()
    """The lengths of the recipe's own rows, where these were read."""
    makes_weights: bool = False
    """Whether no folder with the model's weights was looked at."""

    @cached_property
    def planned(self) -> tuple[RankMemory, ...]:
        """Plan the rows that are rehearsed; the plan itself is of the fullest step."""
        return plan_as_rehearsed(self.plan, self.step)

    @property
    def too_full(self) -> list[tuple[RankResult, PhaseMemory]]:
        """Return the phases whose peak the GPU does not hold, with their ranks."""
        limit = self.plan.cluster.limit
        return [(rank, phase) for rank in self.ranks for phase in rank.phases if self.peak(rank, phase) > limit]

    def fp8_bytes(self, rank: RankResult, phase: PhaseMemory) -> int:
        """Return the bytes that FP8 adds by the planner: TransformerEngine's copies of weights are not rehearsed."""
        plan, computes = self.plan, phase.name == "start" or planned_memory(self.planned, rank, phase) is not None
        return fp8_copies(plan.architecture, plan.layout, plan.work, rank.stage) if computes else 0

    def peak(self, rank: RankResult, phase: PhaseMemory) -> int:
        """Return the bytes at the fullest moment of a phase: those rehearsed, and those of FP8 by the planner."""
        return phase.peak + self.fp8_bytes(rank, phase)

    @property
    def passed(self) -> bool:
        """Return whether nothing was found."""
        return not (self.too_full or self.mismatches or any(rank.error for rank in self.ranks))


def plan_as_rehearsed(plan: Plan, step: Step) -> tuple[RankMemory, ...]:
    """Plan the part of the fullest step that a rehearsal takes."""
    layout, work = plan.layout, plan.work
    rows = step.trained_rows(work.responses_per_prompt) // layout.data
    rehearsed = replace(work, rehearsed=RehearsedStep(step.long_of_replica, rows, 1))
    return plan_memory(plan.architecture, layout, rehearsed).ranks


def planned_memory(planned: Sequence[RankMemory], rank: RankResult, phase: PhaseMemory) -> RankMemory | None:
    """Return the planner's figures for a phase of a rank; None: it does not plan that phase."""
    return next((each for each in planned if each.stage == rank.stage and each.phase == phase.name), None)


def planned_flops(plan: Plan, step: Step, stage: int) -> dict[str, float]:
    """Compute the FLOPs of a rank in the phases of the first step, by the name of the phase.

    Full prompts are counted where the engine runs, and full rows in training; short prompts, the few drawn tokens and
    the gate, which compares a few, are not.

    Args:
        stage: the rank's pipeline stage.
    """
    work, layout = plan.work, plan.layout
    flops = {}
    if work.stage in (StageName.grpo, StageName.pairs):
        # The gate has computed the features of its prompts before, unless they are asked for anew.
        flops["generate"] = _prefill_flops(plan, step.long_of_replica, stage)
    if "evaluate" in work.phases:
        flops["evaluate"] = _prefill_flops(plan, VALIDATED_PROMPTS, stage)
    if work.stage is StageName.pairs:
        return flops
    rows = step.trained_rows(work.responses_per_prompt) / layout.data
    forward, images = _forward_flops(plan, rows, stage), _image_flops(plan, rows / work.responses_per_prompt, stage)
    # Forward and gradients of activations always; gradients of weights where they train; a forward by the reference.
    recomputed = work.recompute is Recompute.full
    flops["update"] = forward * (2 + (Part.language in work.parts) + recomputed + work.has_reference)
    if Part.vision in work.parts:
        flops["update"] += images * (3 + recomputed)
    elif work.stage is not StageName.grpo:
        flops["update"] += images  # no phase before it has left features
    if work.stage is StageName.mpo:
        flops["reference"] = STEPS * (forward + images)
    if "log_probs" in work.phases and step.whole_groups is None:
        flops["log_probs"] = forward + images * (Part.vision in work.parts)
    if "validate" in work.phases:
        units = VALIDATED_PROMPTS
        flops["validate"] = _forward_flops(plan, units * work.rows_together, stage) + _image_flops(plan, units, stage)
    return flops


def _image_flops(plan: Plan, prompts: float, stage: int) -> float:
    """Compute the FLOPs of the images of prompts in the vision tower and the adapter, on a rank of the first stage."""
    architecture, tensor = plan.architecture, plan.layout.tensor
    tile = (vision_flops(architecture.vision, tensor=tensor) + adapter_flops(architecture)) / tensor
    return prompts * plan.work.tiles * tile if stage == 0 else 0.0


def _prefill_flops(plan: Plan, prompts: int, stage: int) -> float:
    """Compute the FLOPs of full prompts with their images in an engine, once for all responses."""
    work, tokens = plan.work, prompts * plan.work.prompt_tokens
    layers = language_layer_flops(plan.architecture, tokens, work.prompt_tokens / 2) * _share(plan, stage)
    return layers + _image_flops(plan, prompts, stage)


def _forward_flops(plan: Plan, rows: float, stage: int) -> float:
    """Compute the FLOPs of a forward pass over full rows, without those of images."""
    work, architecture, layout = plan.work, plan.architecture, plan.layout
    tokens, context = training_tokens(work, rows, work.response_tokens)
    forward = language_layer_flops(architecture, tokens, context) * _share(plan, stage)
    if Part.score not in work.parts and stage == layout.pipeline - 1:
        # Of a shared row only the tokens of responses get logits.
        outputs = rows * work.response_tokens if work.shares_prompts else tokens
        forward += head_flops(architecture, outputs) / layout.tensor
    return forward


def _share(plan: Plan, stage: int) -> float:
    """Return the part of the language model's layers that a rank of a stage computes."""
    layout, architecture = plan.layout, plan.architecture
    return layout.layers_of_stage(architecture, stage) / architecture.language.num_layers / layout.tensor


def ranks_to_rehearse(layout: Layout, *, all_ranks: bool) -> list[int]:
    """Return the numbers of the ranks that differ: the first of each pipeline stage.

    Args:
        all_ranks: the first and the last tensor-parallel rank of each stage, in the first and the last replica too.
    """
    tensor = {0, layout.tensor - 1} if all_ranks else {0}
    data = {0, layout.data - 1} if all_ranks else {0}
    # megatron-core's order: tensor, then data, then pipeline.
    return sorted(
        stage * layout.data * layout.tensor + replica * layout.tensor + part
        for stage in range(layout.pipeline)
        for replica in data
        for part in tensor
    )


def rehearse(
    recipe: TrainingRecipe | PairsRecipe,
    config: Mapping[str, object],
    plan: Plan,
    *,
    hf_path: Path | None,
    all_ranks: bool,
    own_data: bool,
) -> Rehearsal:
    """Rehearse a recipe on its cluster.

    Args:
        config: of the model, as transformers' InternVL has it.
        plan: of the recipe on the cluster.
        hf_path: the model's folder; None: there is none.
        own_data: whether to rehearse on the longest rows of the recipe's data sets instead of made ones.

    Raises:
        DataEndsRunError: with `own_data`, rows would end the run; nothing is rehearsed.
        ValueError: among others, a data set of the recipe is missing.
    """
    layout = plan.layout
    with tempfile.TemporaryDirectory(prefix="r1v2-rehearsal-") as name:
        folder = Path(name)
        inputs = write_rehearsal(
            recipe,
            config,
            plan.architecture,
            layout,
            folder=folder / "inputs",
            hf_path=hf_path,
            own_data=own_data,
        )
        step = inputs.step
        assert recipe.stage is not None
        specs = [
            RankSpec(
                recipe=str(inputs.recipe),
                stage=recipe.stage,
                rank=rank,
                world_size=layout.tensor * layout.pipeline * layout.data,
                gpus_per_node=plan.cluster.gpus_per_node,
                gpu_memory_gib=plan.cluster.gpu_memory_gib,
                gpu_reserve_gib=plan.cluster.reserve_gib,
                rehearsed_prompts=step.long_of_replica,
                prompts_of_step=step.prompts_of_replica,
                mixed_groups=step.mixed_groups,
                whole_groups=step.whole_groups,
            )
            for rank in ranks_to_rehearse(layout, all_ranks=all_ranks)
        ]
        results = rehearse_ranks(specs, folder)
    for result in results:
        result.stage, result.place = _place(result.rank, layout)
    complete = {result.rank: result.collectives for result in results if not result.error}
    return Rehearsal(
        plan,
        tuple(results),
        tuple(find_mismatches(complete)),
        step,
        changes=inputs.changes,
        data=inputs.data,
        makes_weights=inputs.makes_weights,
    )


def rehearse_ranks(specs: Sequence[RankSpec], folder: Path) -> list[RankResult]:
    """Rehearse ranks, each in a process of its own, as many at once as there are processors.

    Args:
        folder: for the files between the processes.
    """
    folders = {spec.rank: folder / f"rank-{spec.rank}" for spec in specs}
    processes = _Processes()
    with _told_phases(folders), ThreadPoolExecutor(min(len(specs), os.cpu_count() or 1)) as pool, _raised_sigterm():
        try:
            return list(pool.map(lambda spec: _rehearse_in_process(spec, folder, processes), specs))
        finally:
            processes.end()


@contextmanager
def _told_phases(folders: Mapping[int, Path]) -> Iterator[None]:
    """Print from time to time on standard error in what phase each rank is."""
    ended, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(TELL_SECONDS):
            phases = [f"rank {rank}: {_phase(own)}" for rank, own in folders.items() if _is_rehearsed(own)]
            print(f"rehearsing for {time.monotonic() - began:.0f} s; {', '.join(phases)}", file=sys.stderr, flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def _is_rehearsed(own: Path) -> bool:
    return own.is_dir() and not (own / "result.json").is_file()


def _phase(own: Path) -> str:
    return (own / PHASE_FILE).read_text() if (own / PHASE_FILE).is_file() else _BEFORE


@contextmanager
def _raised_sigterm() -> Iterator[None]:
    """Let SIGTERM raise as Ctrl-C does: Python would end at once, and leave the ranks and their files behind."""
    if threading.current_thread() is not threading.main_thread():  # which alone hears of signals
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Processes:
    """The processes of a rehearsal, none of which outlives it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: list[subprocess.Popen[bytes]] = []
        self._given_up = False

    def run(self, command: Sequence[str], log: IO[str]) -> int:
        """Run a command to its end and return its exit status."""
        with self._lock:
            if self._given_up:
                return -signal.SIGKILL
            # One thread: nothing is computed.
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            # A session of its own: the stage would take Ctrl-C as a wish to finish its step.
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
            self._begun.append(process)
        return process.wait()

    def end(self) -> None:
        """Kill what still runs, and begin nothing more."""
        with self._lock:
            self._given_up = True
            for process in self._begun:
                process.kill()


def _rehearse_in_process(spec: RankSpec, folder: Path, processes: _Processes) -> RankResult:
    own = folder / f"rank-{spec.rank}"
    own.mkdir()
    spec.write(own / "spec.json")
    command = [sys.executable, "-m", "megatron_r1v2.rehearsal.rank", str(own / "spec.json"), str(own / "result.json")]
    with (own / "log").open("w") as log:
        status = processes.run(command, log)
    if status or not (own / "result.json").is_file():
        lines = (own / "log").read_text().splitlines()[-_LOG_LINES:]
        return RankResult(spec.rank, error="\n".join([_ended_with(status), *lines]), error_phase=_phase(own))
    return RankResult.read(own / "result.json")


def _ended_with(status: int) -> str:
    if status == -signal.SIGKILL:
        return "the process was killed, as Linux does where the memory of this machine is used up"
    if status in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return f"the process ended with status {status}: a SIGTERM from outside; rehearse again"
    return f"the process ended with status {status}"


def _place(rank: int, layout: Layout) -> tuple[int, str]:
    tensor, rest = rank % layout.tensor, rank // layout.tensor
    stage = rest // layout.data
    return stage, f"rank {rank}, stage {stage}, TP {tensor}, DP {rest % layout.data}"
