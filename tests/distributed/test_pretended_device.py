"""Every stage on a pretended GPU, at one rank, TP2 with sequence parallelism, PP2 and DP2."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1v2.stages.evaluate import run_evaluation
from megatron_r1v2.stages.pairs import run_pairs
from megatron_r1v2.training.policy import Policy
from tests.pretended_device import RefusedByCuda, pretended_device
from tests.ranks import run_ranks
from tests.stages.runs import Ranks, recipe_for, run_stage
from tests.stages.tiny_run import tiny_recipe

LAYOUTS = {
    "one rank": (1, ()),
    "TP2 + SP": (2, ("parallel.tensor=2", "parallel.sequence=true")),
    "PP2": (2, ("parallel.pipeline=2",)),
    "DP2": (2, ("model.precision=bf16",)),
}
SMALL = ("train.prompts_per_step=4", "train.steps=1", "generation.max_response_tokens=6")
VALIDATED = ("evaluation.every_steps=1", "evaluation.prompts=2", "evaluation.runs=1", "evaluation.top_p=0.9")
OVERRIDES = {
    "align": (*SMALL, *VALIDATED),
    "mpo": (*SMALL, *VALIDATED, "train.parts=[adapter, language]", "train.recompute=selective"),
    "reward_model": ("train.prompts_per_step=4", "train.steps=1"),
    "pairs": (
        "train.prompts_per_step=6",
        "generation.responses_per_prompt=24",
        "generation.max_response_tokens=8",
        "pairs.max_pairs_per_prompt=2",
    ),
    # Everything that a step may have: a reference, importance weights, replay, recomputation, prefill in chunks.
    "grpo": (
        *SMALL,
        *VALIDATED,
        "train.steps=2",
        "train.parts=[adapter, language, vision]",
        "train.recompute=full",
        "train.updates_per_step=2",
        "train.skip_above_grad_norm=1e6",
        "algorithm.kl_coefficient=0.1",
        "algorithm.importance_cap=2.0",
        "buffer.target_effective_fraction=0.9",
        "generation.max_tokens_per_step=72",
    ),
    "evaluate": ("evaluation.runs=1", "evaluation.prompts=4"),
}
# Replicas that train nothing share prompts through the store, and results as objects.
SEND_NO_TENSORS = {("evaluate", "DP2"), ("pairs", "DP2")}
FAST = {("grpo", "one rank"), ("grpo", "TP2 + SP"), ("mpo", "PP2"), ("align", "DP2"), ("evaluate", "TP2 + SP")}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def aligned(root: Path) -> Path:
    """Return a model that has learnt enough to answer: a random one's responses make no pairs."""
    learn = ("train.steps=12", "train.learning_rate=0.01", "checkpoint.every_steps=0", "train.parts=[language]")
    Ranks(recipe_for(root, root / "aligned", learn, stage="align")).wait()
    return root / "aligned"


def run_pretended(stage: str, root: Path, output: Path, overrides: tuple[str, ...]) -> dict[str, int]:
    with pretended_device() as operators:
        recipe = recipe_for(root, output, overrides, stage=stage)
        if stage == "evaluate":
            run_evaluation(recipe, "test")
        elif stage == "pairs":
            run_pairs(recipe)
        else:
            run_stage(recipe)
    return {"operators": operators.on_device, "collectives": operators.collectives}


@pytest.mark.parametrize(
    ("stage", "layout"),
    [
        pytest.param(stage, layout, marks=() if (stage, layout) in FAST else pytest.mark.slow)
        for stage in OVERRIDES
        for layout in LAYOUTS
    ],
)
def test_a_stage_does_nothing_that_a_gpu_refuses(
    root: Path, tmp_path: Path, request: pytest.FixtureRequest, stage: str, layout: str
) -> None:
    world_size, overrides = LAYOUTS[layout]
    overrides += OVERRIDES[stage]
    if stage == "pairs":
        overrides += (f"model.checkpoint={request.getfixturevalue('aligned')}",)
    if stage == "evaluate":
        overrides += (f"evaluation.data={root / 'data'}",)
    elif stage not in ("pairs", "reward_model"):
        overrides += (f"data.validation={root / 'data'}",)
    for rank in run_ranks(world_size, run_pretended, stage, root, tmp_path / "run", overrides):
        assert rank["operators"] > 1000, "they ran on the device"
        assert rank["collectives"] > 10 or world_size == 1 or (stage, layout) in SEND_NO_TENSORS


def run_with_a_fault(root: Path, output: Path) -> str:
    read = Policy.read
    Policy.read = lambda self, output, labels_BS: read(self, output, labels_BS.cpu())
    try:
        run_pretended("align", root, output, (*OVERRIDES["align"], f"data.validation={root / 'data'}"))
    except RefusedByCuda as error:
        return str(error)
    return "nothing was found"


def test_labels_that_stay_on_the_host_are_found_with_the_line(root: Path, tmp_path: Path) -> None:
    """The stage, broken on purpose."""
    (found,) = run_ranks(1, run_with_a_fault, root, tmp_path / "run")
    assert "of tensors on two devices, those of the host [(" in found
    assert "models/log_probs.py:" in found or "tensor_parallel/cross_entropy.py:" in found
