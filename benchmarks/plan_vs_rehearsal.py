"""The planner's memory beside that of a rehearsal: the stage's own code at the true width, with few layers.

`python -m benchmarks.plan_vs_rehearsal examples/r1v2_38b [NAME...]` prints the table of docs/planning.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_r1v2.checkpoint.hf.config import sizes_config
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.planning.known_models import KNOWN_MODELS
from megatron_r1v2.planning.memory import RankMemory, plan_memory
from megatron_r1v2.planning.plan import Cluster, Plan, make_plan
from megatron_r1v2.planning.scale_page import read_cluster
from megatron_r1v2.planning.workload import RehearsedStep
from megatron_r1v2.rehearsal.few_layers import Layers
from megatron_r1v2.rehearsal.ledger import PhaseMemory
from megatron_r1v2.rehearsal.preparation import Step
from megatron_r1v2.rehearsal.run import rehearse

RECIPES = (
    *("align", "mpo", "reward_model", "pairs", "grpo", "grpo_fp8", "grpo_one_gpu", "grpo_language"),
    *("grpo_64k", "grpo_language_64k", "grpo_from_skywork", "grpo_from_internvl3"),
)
MODELS = {"grpo_from_internvl3": "internvl3-38b"}
"""The known model of a recipe, where it is not r1v2-38b."""
LAYERS = ((2, 2), (2, 6))
"""Of the vision tower and of the language model."""
FEW_REQUESTS = ("generation.max_requests=16",)
"""Every request of the engine takes time in a rehearsal; the plan has as many."""
_MIB = 2**20
_HEAD = "| recipe | layers | stage | phase | rehearsed | planned | |"


@dataclass(frozen=True)
class Compared:
    """A phase of a rank, rehearsed and planned."""

    stage: int
    rehearsed: PhaseMemory
    planned: RankMemory

    @property
    def deviation(self) -> float:
        """Return by how much the planner says more."""
        return self.planned.total / self.rehearsed.peak - 1

    @property
    def terms(self) -> str:
        """Return the terms in MiB, rehearsed and planned, and the line of code at the peak."""
        terms = (
            f"{name} {size / _MIB:.0f}/{getattr(self.planned, name) / _MIB:.0f}"
            for name, size in self.rehearsed.at_peak.items()
        )
        return (
            f"stage {self.stage}, {self.planned.phase} {self.deviation:+.1%}: {', '.join(terms)} "
            f"at {self.rehearsed.line or 'its beginning'}"
        )


def compare(
    path: Path, overrides: Sequence[str], *, layers: tuple[int, int], model: str = "", gpus: int = 0
) -> list[Compared]:
    """Rehearse a recipe on its cluster and plan the rows that were rehearsed; take the fuller of the two steps.

    Args:
        path: of the recipe, whose first line is its cluster.
        layers: of the vision tower and of the language model.
        model: a known one; empty: the recipe's.
        gpus: in place of the recipe's.

    Raises:
        RuntimeError: the rehearsal has failed, or a phase of the plan was not rehearsed.
    """
    config = sizes_config(Layers(*layers).given_to(KNOWN_MODELS[model or MODELS.get(path.stem, "r1v2-38b")]))
    recipe = load_recipe(path, overrides)
    own_gpus, hardware = read_cluster(path)
    plan = make_plan(recipe, config, Cluster(gpus or own_gpus, 8, hardware.memory_gib, 4.0, hardware))
    found = rehearse(recipe, config, plan, hf_path=None, all_ranks=False, own_data=False)
    if errors := [f"stage {rank.stage}, {rank.error_phase}: {rank.error}" for rank in found.ranks if rank.error]:
        raise RuntimeError("\n".join(errors))
    planned = {(each.stage, each.phase): each for each in plan_as_rehearsed(plan, found.step)}
    fullest: dict[tuple[int, str], PhaseMemory] = {}
    for rank in found.ranks:
        for phase in rank.phases:
            place = rank.stage, phase.name
            # The second step finds the buffers that the first one leaves.
            if place in planned and (place not in fullest or phase.peak > fullest[place].peak):
                fullest[place] = phase
    if missing := planned.keys() - fullest.keys():
        raise RuntimeError(f"planned, but not rehearsed: {sorted(missing)}")
    return [Compared(place[0], fullest[place], memory) for place, memory in planned.items()]


def plan_as_rehearsed(plan: Plan, step: Step) -> tuple[RankMemory, ...]:
    """Plan the part of the fullest step that a rehearsal takes."""
    layout, work = plan.layout, plan.work
    rows = step.trained_rows(work.responses_per_prompt) // layout.data
    rehearsed = replace(work, rehearsed=RehearsedStep(step.long_of_replica, rows, 1))
    return plan_memory(plan.architecture, layout, rehearsed).ranks


def table_rows(name: str, layers: tuple[int, int], compared: Sequence[Compared]) -> list[str]:
    """Return the rows of a recipe."""
    return [
        f"| `{name}` | {layers[1]} | {each.stage} | {each.planned.phase} | {each.rehearsed.peak / _MIB:,.0f} "
        f"| {each.planned.total / _MIB:,.0f} | {each.deviation:+.1%} |"
        for each in compared
    ]


def main(folder: Path, names: Sequence[str]) -> None:
    """Print the table, a recipe as soon as it is rehearsed."""
    print(f"{_HEAD}\n{'| --- ' * (_HEAD.count('|') - 1)}|", flush=True)
    for name in names or RECIPES:
        for layers in LAYERS:
            rows = table_rows(name, layers, compare(folder / f"{name}.yaml", FEW_REQUESTS, layers=layers))
            print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
