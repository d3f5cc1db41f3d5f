"""The planner's memory beside that of a rehearsal: the stage's own code at the true width, with few layers."""

from copy import deepcopy
from dataclasses import dataclass, replace

import pytest

from megatron_r1v2.checkpoint.hf.config import sizes_config
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.planning.hardware import HARDWARE
from megatron_r1v2.planning.known_models import KNOWN_MODELS
from megatron_r1v2.planning.memory import RankMemory, plan_memory
from megatron_r1v2.planning.plan import Cluster, Plan, make_plan
from megatron_r1v2.planning.workload import RehearsedStep
from megatron_r1v2.rehearsal.ledger import PhaseMemory
from megatron_r1v2.rehearsal.preparation import Step
from megatron_r1v2.rehearsal.run import rehearse
from tests.planning.plans import RECIPE

WITHIN = 0.05


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


def compare(name, *overrides, layers, gpus, gpu="h100", model="r1v2-38b") -> list[Compared]:
    """Rehearse a recipe and plan the rows that were rehearsed.

    Args:
        layers: of the vision tower and of the language model.
    """
    config = sizes_config(shortened(model, *layers))
    recipe = load_recipe(RECIPE.parent / f"{name}.yaml", overrides)
    hardware = HARDWARE[gpu]
    plan = make_plan(recipe, config, Cluster(gpus, 8, hardware.memory_gib, 4.0, hardware))
    found = rehearse(recipe, config, plan, hf_path=None, all_ranks=False, own_data=False)
    errors = [f"{rank.error_phase}: {rank.error}" for rank in found.ranks if rank.error]
    assert not errors, "\n".join(errors)
    planned = {(each.stage, each.phase): each for each in planned_as_rehearsed(plan, found.step)}
    compared = [
        Compared(rank.stage, phase, planned[rank.stage, phase.name])
        for rank in found.ranks
        for phase in rank.phases
        if (rank.stage, phase.name) in planned
    ]
    assert {(each.stage, each.rehearsed.name) for each in compared} == planned.keys(), "a phase was not rehearsed"
    return compared


def shortened(model: str, vision: int, language: int) -> dict[str, object]:
    """Return the config of a known model with few layers."""
    config = deepcopy(dict(KNOWN_MODELS[model]))
    config["vision_config"]["num_hidden_layers"] = vision
    config["text_config"]["num_hidden_layers"] = language
    return config


def planned_as_rehearsed(plan: Plan, step: Step) -> tuple[RankMemory, ...]:
    """Plan the part of the fullest step that a rehearsal takes."""
    layout, work = plan.layout, plan.work
    rows = step.trained_rows(work.responses_per_prompt) // layout.data
    rehearsed = replace(work, rehearsed=RehearsedStep(step.long_of_replica, rows, 1))
    return plan_memory(plan.architecture, layout, rehearsed).ranks


# Of grpo, gate and evaluate are not held: with 2 layers the plan of the gate is 16 % above its first rehearsal, and
# evaluate begins while the features of the last step are held, which the planner leaves out (22 % below).
@pytest.mark.slow
@pytest.mark.parametrize(("name", "phases"), [("align", {"update", "evaluate"}), ("grpo", {"generate", "update"})])
def test_the_planner_says_what_the_rehearsal_finds(name, phases):
    compared = [each for each in compare(name, layers=(2, 2), gpus=8) if each.rehearsed.name in phases]
    assert {each.rehearsed.name for each in compared} == phases
    wrong = {each.rehearsed.name: each.deviation for each in compared if abs(each.deviation) > WITHIN}
    assert not wrong, f"more than {WITHIN:.0%} apart: {wrong}"
