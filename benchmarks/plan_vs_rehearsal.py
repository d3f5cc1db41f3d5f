"""The planner's memory beside that of a rehearsal: the stage's own code at the true width, with few layers.

    python -m benchmarks.plan_vs_rehearsal examples/r1v2_38b [NAME...] --keep FILE

prints the table of docs/planning.md: each phase with few layers, and both figures on the line through two layer counts
to all layers. FILE keeps every rehearsal as soon as it ends. The next call with it goes on from there, and plans anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_r1v2.checkpoint.hf.config import sizes_config
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.planning.known_models import KNOWN_MODELS
from megatron_r1v2.planning.memory import RankMemory
from megatron_r1v2.planning.plan import Cluster, Plan, make_plan
from megatron_r1v2.planning.scale_page import read_cluster
from megatron_r1v2.rehearsal.few_layers import Layers, Line
from megatron_r1v2.rehearsal.ledger import CATEGORIES, PhaseMemory
from megatron_r1v2.rehearsal.preparation import Step
from megatron_r1v2.rehearsal.run import Rehearsal, plan_as_rehearsed, rehearse

RECIPES = (
    *("align", "mpo", "reward_model", "pairs", "grpo", "grpo_fp8", "grpo_one_gpu", "grpo_language"),
    *("grpo_64k", "grpo_language_64k", "grpo_from_skywork", "grpo_from_internvl3"),
)
MODELS = {"grpo_from_internvl3": "internvl3-38b"}
"""The known model of a recipe, where it is not r1v2-38b."""
LINE = Line.through(Layers.of(KNOWN_MODELS["r1v2-38b"]))
"""Two layer counts, and all layers."""
FEW_REQUESTS = 16
"""A cache that takes what is free would take much more with few layers than with all, which is no line; and every
request takes time in a rehearsal. The plan has as many."""
FEW_LONG_REQUESTS = 8
"""The same of the 64k recipes: the cache of 16 such requests does not fit into a GPU with all layers."""
_WITHOUT_ENGINE = ("reward_model",)
_MIB = 2**20
_HEAD = "| recipe | stage | phase | rehearsed | planned | | all layers: rehearsed | planned | |"

Place = tuple[int, str]
"""A pipeline stage and a phase."""


@dataclass(frozen=True)
class Case:
    """A recipe on a cluster, with few layers or with all."""

    recipe: Path
    """Its first line is its cluster."""
    overrides: tuple[str, ...]
    layers: Layers
    gpus: int = 0
    """In place of the recipe's; 0: those."""

    @property
    def config(self) -> dict[str, object]:
        """Return the configuration of the model."""
        model = KNOWN_MODELS[MODELS.get(self.recipe.stem, "r1v2-38b")]
        return sizes_config(self.layers.given_to(model))

    def plan(self) -> Plan:
        """Plan it."""
        gpus, hardware = read_cluster(self.recipe)
        recipe = load_recipe(self.recipe, self.overrides)
        return make_plan(recipe, self.config, Cluster(self.gpus or gpus, 8, hardware.memory_gib, 4.0, hardware))


@dataclass(frozen=True)
class Rehearsed:
    """The memory of each phase, of the fuller of two steps, and the rows of these steps."""

    phases: Mapping[Place, PhaseMemory]
    step: Step

    def as_json(self) -> dict[str, object]:
        """Return it as JSON values."""
        phases = [[stage, asdict(phase)] for (stage, _), phase in self.phases.items()]
        return {"step": asdict(self.step), "phases": phases}

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> Rehearsed:
        """Read what `as_json` has returned."""
        found, step = values["phases"], values["step"]
        assert isinstance(found, list)
        assert isinstance(step, dict)
        phases = [(stage, PhaseMemory(**phase)) for stage, phase in found]
        return cls({(stage, phase.name): phase for stage, phase in phases}, Step(**step))


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


def rehearse_case(case: Case) -> Rehearsed:
    """Rehearse a case.

    Raises:
        RuntimeError: the rehearsal has failed.
    """
    return fullest_phases(rehearse_all(case))


def rehearse_all(case: Case) -> Rehearsal:
    """Rehearse a case, and return all that was found.

    Raises:
        RuntimeError: the rehearsal has failed.
    """
    recipe = load_recipe(case.recipe, case.overrides)
    found = rehearse(recipe, case.config, case.plan(), hf_path=None, all_ranks=False, own_data=False)
    if errors := [f"stage {rank.stage}, {rank.error_phase}: {rank.error}" for rank in found.ranks if rank.error]:
        raise RuntimeError("\n".join(errors))
    return found


def fullest_phases(found: Rehearsal) -> Rehearsed:
    """Return the memory of each phase in the fuller of two steps."""
    fullest: dict[Place, PhaseMemory] = {}
    for rank in found.ranks:
        for phase in rank.phases:
            place = rank.stage, phase.name
            # The second step finds the buffers that the first one leaves.
            if place not in fullest or phase.peak > fullest[place].peak:
                fullest[place] = phase
    return Rehearsed(fullest, found.step)


def compare(case: Case, rehearsed: Rehearsed) -> list[Compared]:
    """Plan the rows that were rehearsed.

    Raises:
        RuntimeError: a phase of the plan was not rehearsed.
    """
    return _side_by_side(plan_as_rehearsed(case.plan(), rehearsed.step), rehearsed.phases)


def extend(few: Sequence[Compared], more: Sequence[Compared], line: Line = LINE) -> list[Compared]:
    """Extend what was compared at two layer counts to all layers, which shows where the bytes of a layer differ.

    The planner's figure for all layers may be higher, where another moment is then the fullest.
    """
    return [_extend(line, low, high) for low, high in zip(few, more, strict=True)]


def _extend(line: Line, few: Compared, more: Compared) -> Compared:
    def whole(low: int, high: int) -> int:
        return round(line.extend(low, high))

    measured = few.rehearsed, more.rehearsed
    rehearsed = PhaseMemory(
        few.rehearsed.name,
        0,
        whole(*(each.peak for each in measured)),
        at_peak={name: whole(*(each.at_peak.get(name, 0) for each in measured)) for name in CATEGORIES},
        line=more.rehearsed.line,
    )
    terms = {name: whole(getattr(few.planned, name), getattr(more.planned, name)) for name in CATEGORIES}
    return Compared(few.stage, rehearsed, replace(few.planned, **terms))


def _side_by_side(planned: Sequence[RankMemory], phases: Mapping[Place, PhaseMemory]) -> list[Compared]:
    if missing := sorted({(each.stage, each.phase) for each in planned} - phases.keys()):
        raise RuntimeError(f"planned, but not rehearsed: {missing}")
    return [Compared(each.stage, phases[each.stage, each.phase], each) for each in planned]


def recipe_cases(folder: Path, name: str, line: Line = LINE) -> tuple[Case, Case]:
    """Return a recipe with few layers and with more."""
    requests = FEW_LONG_REQUESTS if name.endswith("64k") else FEW_REQUESTS
    overrides = () if name in _WITHOUT_ENGINE else (f"generation.max_requests={requests}",)
    few, more = (Case(folder / f"{name}.yaml", overrides, layers) for layers in (line.few, line.more))
    return few, more


def table_rows(name: str, few: Sequence[Compared], whole: Sequence[Compared]) -> list[str]:
    """Return the rows of a recipe."""
    return [
        f"| `{name}` | {low.stage} | {low.planned.phase} | {_cells(low)} | {_cells(high)} |"
        for low, high in zip(few, whole, strict=True)
    ]


def _cells(each: Compared) -> str:
    return f"{each.rehearsed.peak / _MIB:,.0f} | {each.planned.total / _MIB:,.0f} | {each.deviation:+.1%}"


class Kept:
    """The rehearsals in a file.

    Args:
        path: None: they are not kept.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found = json.loads(path.read_text()) if path is not None and path.is_file() else {}

    def rehearse(self, case: Case) -> Rehearsed:
        """Return the rehearsal of a case, made now if it is not there."""
        key = f"{case.recipe.stem} {case.layers.vision} {case.layers.language} {' '.join(case.overrides)}"
        if key not in self._found:
            self._found[key] = rehearse_case(case).as_json()
            if self._path is not None:
                self._path.write_text(json.dumps(self._found))
        return Rehearsed.from_json(self._found[key])


def main(argv: Sequence[str]) -> None:
    """Print the table, a recipe as soon as it is rehearsed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the recipes")
    parser.add_argument("names", nargs="*", default=RECIPES, help="of some of them; default: all")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="JSON file of finished rehearsals")
    asked = parser.parse_args(argv)
    kept = Kept(asked.keep)
    print(f"{_HEAD}\n{'| --- ' * (_HEAD.count('|') - 1)}|", flush=True)
    for name in asked.names:
        cases = recipe_cases(asked.folder, name)
        few, more = (compare(case, kept.rehearse(case)) for case in cases)
        print("\n".join(table_rows(name, few, extend(few, more))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
