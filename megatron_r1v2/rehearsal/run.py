"""The rehearsal of a recipe: a process for each rank, and what they found together, beside the plan."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_r1v2.config.choices import StageName
from megatron_r1v2.config.recipes import PairsRecipe, TrainingRecipe
from megatron_r1v2.planning.memory import RankMemory
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.planning.plan import Plan
from megatron_r1v2.rehearsal.collectives import find_mismatches
from megatron_r1v2.rehearsal.ledger import PhaseMemory
from megatron_r1v2.rehearsal.preparation import write_rehearsal
from megatron_r1v2.rehearsal.rank import RankResult, RankSpec

REHEARSED = (StageName.align, StageName.mpo, StageName.grpo)
"""The stages whose step is known here."""
_LOG_LINES = 20


@dataclass(frozen=True)
class Rehearsal:
    """The findings of all rehearsed ranks."""

    plan: Plan
    ranks: tuple[RankResult, ...]
    mismatches: tuple[str, ...]

    @property
    def too_full(self) -> list[tuple[RankResult, PhaseMemory]]:
        """Return the phases whose peak the GPU does not hold, with their ranks."""
        return [(rank, phase) for rank in self.ranks for phase in rank.phases if phase.peak > self.plan.cluster.limit]

    @property
    def passed(self) -> bool:
        """Return whether nothing was found."""
        return not (self.too_full or self.mismatches or any(rank.error for rank in self.ranks))


def planned_memory(plan: Plan, rank: RankResult, phase: PhaseMemory) -> RankMemory | None:
    """Return the planner's figures for a phase of a rank; None: it does not plan that phase."""
    return next((each for each in plan.memory.ranks if each.stage == rank.stage and each.phase == phase.name), None)


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
) -> Rehearsal:
    """Rehearse a recipe on its cluster.

    Args:
        config: of the model, as transformers' InternVL has it.
        plan: of the recipe on the cluster.
        hf_path: the model's folder; None: there is none.

    Raises:
        ValueError: the recipe is of a stage that is not rehearsed.
    """
    if recipe.stage not in REHEARSED:
        raise ValueError(
            f"run.stage={recipe.stage.value if recipe.stage else None!r} is not rehearsed; accepted: "
            f"{', '.join(stage.value for stage in REHEARSED)}; r1v2 plan knows every stage"
        )
    layout = plan.layout
    with tempfile.TemporaryDirectory(prefix="r1v2-rehearsal-") as name:
        folder = Path(name)
        path, step = write_rehearsal(
            recipe, config, plan.architecture, layout, folder=folder / "inputs", hf_path=hf_path
        )
        assert recipe.stage is not None
        specs = [
            RankSpec(
                recipe=str(path),
                stage=recipe.stage,
                rank=rank,
                world_size=layout.tensor * layout.pipeline * layout.data,
                gpus_per_node=plan.cluster.gpus_per_node,
                gpu_memory_gib=plan.cluster.gpu_memory_gib,
                rehearsed_prompts=step.long_of_replica,
                prompts_of_step=step.prompts_of_replica,
                mixed_groups=step.mixed_groups,
            )
            for rank in ranks_to_rehearse(layout, all_ranks=all_ranks)
        ]
        results = rehearse_ranks(specs, folder)
    for result in results:
        result.stage, result.place = _place(result.rank, layout)
    complete = {result.rank: result.collectives for result in results if not result.error}
    return Rehearsal(plan, tuple(results), tuple(find_mismatches(complete)))


def rehearse_ranks(specs: Sequence[RankSpec], folder: Path) -> list[RankResult]:
    """Rehearse ranks, each in a process of its own, as many at once as there are processors.

    Args:
        folder: for the files between the processes.
    """
    with ThreadPoolExecutor(min(len(specs), os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda spec: _rehearse_in_process(spec, folder), specs))


def _rehearse_in_process(spec: RankSpec, folder: Path) -> RankResult:
    own = folder / f"rank-{spec.rank}"
    own.mkdir()
    spec.write(own / "spec.json")
    command = [sys.executable, "-m", "megatron_r1v2.rehearsal.rank", str(own / "spec.json"), str(own / "result.json")]
    with (own / "log").open("w") as log:
        # One thread: nothing is computed.
        status = subprocess.run(
            command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
        ).returncode
    if status or not (own / "result.json").is_file():
        lines = (own / "log").read_text().splitlines()[-_LOG_LINES:]
        return RankResult(spec.rank, error="\n".join([f"the process ended with status {status}", *lines]))
    return RankResult.read(own / "result.json")


def _place(rank: int, layout: Layout) -> tuple[int, str]:
    tensor, rest = rank % layout.tensor, rank // layout.tensor
    stage = rest // layout.data
    return stage, f"stage {stage}, TP {tensor}, DP {rest % layout.data}"
