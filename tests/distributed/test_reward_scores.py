"""A reward model from a checkpoint scores alike in every layout of the policy."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1v2.config.recipes import GrpoRecipe
from megatron_r1v2.config.schema import ParallelConfig, Part, RewardConfig, RewardModelConfig
from megatron_r1v2.stages.loaded_model import load_model
from megatron_r1v2.stages.loaded_reward_model import load_reward_model
from megatron_r1v2.stages.reward_model import run_reward_model
from tests.parallel_layouts import start_layout
from tests.ranks import run_ranks
from tests.stages.tiny_run import tiny_recipe

LAYOUTS = {
    "TP2": ParallelConfig(tensor=2),
    "SP2": ParallelConfig(tensor=2, sequence=True),
    "PP2": ParallelConfig(pipeline=2),
    "DP2": ParallelConfig(),
}


def scores_in(recipe: GrpoRecipe, parallel: ParallelConfig) -> list[float]:
    """Score some responses with a policy beside; under DP each replica takes another number of them."""
    context = start_layout(parallel)
    policy = load_model(recipe.changed(parallel=parallel), context)
    model = load_reward_model(policy, recipe.changed(parallel=parallel))
    prompts = list(policy.read_prompts(recipe.data.train))[: 5 + context.data_rank]
    return model.score(
        [prompt for prompt in prompts for _ in range(2)],
        [text for prompt in prompts for text in (prompt.preference.chosen, prompt.preference.rejected)],
    )


def scores_in_layouts(recipe: GrpoRecipe, layouts: dict[str, ParallelConfig]) -> dict[str, list[float]]:
    return {name: scores_in(recipe, layout) for name, layout in layouts.items()}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> GrpoRecipe:
    root = tmp_path_factory.mktemp("scores")
    training = tiny_recipe(root, steps=2, stage="reward_model")
    run_ranks(1, run_reward_model, training)
    assert Part.score in training.train.parts
    return tiny_recipe(root).changed(
        reward=RewardConfig(model_weight=0.5),
        reward_model=RewardModelConfig(checkpoint=str(Path(training.run.output_dir))),
    )


@pytest.fixture(scope="module")
def one_rank(recipe: GrpoRecipe) -> list[float]:
    (found,) = run_ranks(1, scores_in_layouts, recipe, {"one": ParallelConfig()})
    return found["one"]


@pytest.fixture(scope="module")
def two_ranks(recipe: GrpoRecipe) -> list[dict[str, list[float]]]:
    return run_ranks(2, scores_in_layouts, recipe, LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_give_the_scores_of_one(name, one_rank, two_ranks):
    first, second = (rank[name] for rank in two_ranks)
    assert first == pytest.approx(one_rank, abs=1e-5)
    assert second[: len(first)] == pytest.approx(first, abs=1e-6)
    assert len(second) == len(first) + (2 if name == "DP2" else 0)
    assert name == "DP2" or first == second, "to the bit the same on all ranks of a replica"
    assert len({round(score, 5) for score in first}) > 5
