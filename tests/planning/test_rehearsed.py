"""The planner's memory beside that of a rehearsal, phase by phase, in random layouts.

tests/rehearsal/test_few_layers.py compares the recipes of the 38B model.
"""

import random

import pytest

from benchmarks.plan_vs_rehearsal import Case, compare, rehearse_case
from megatron_r1v2.rehearsal.few_layers import Layers
from tests.planning.plans import RECIPE, check_planned

FOLDER = RECIPE.parent


@pytest.mark.slow
def test_every_phase_of_grpo_with_few_layers_takes_what_is_planned():
    # The input of the first layer of the tower is a view: a second layer has one of its own.
    case = Case(RECIPE, ("generation.max_requests=8",), Layers(2, 1))
    compared = compare(case, rehearse_case(case))
    assert [each.planned.phase for each in compared] == ["gate", "generate", "update", "evaluate"]
    check_planned(compared)


@pytest.mark.slow
def test_a_reward_model_beside_the_policy_takes_what_is_planned():
    beside = ("reward.model_weight=0.5", "reward_model.checkpoint=nowhere")
    case = Case(RECIPE, ("generation.max_requests=8", *beside), Layers(2, 1))
    compared = compare(case, rehearse_case(case))
    assert [each.planned.phase for each in compared] == ["gate", "generate", "reward", "update", "evaluate"]
    check_planned(compared)


PARTS = {
    "grpo": ("adapter", "adapter, language", "vision, adapter, language"),
    "align": ("adapter", "adapter, language", "vision, adapter"),
    "mpo": ("adapter", "adapter, language", "vision, adapter, language"),
    "reward_model": ("adapter, score", "adapter, language, score"),
    "pairs": (),
}


def random_run(seed):
    """Return a recipe with changes, few layers and other GPUs."""
    source = random.Random(seed)
    name = source.choice(["grpo", "grpo", "grpo", "align", "mpo", "reward_model", "pairs"])
    tensor, pipeline, data = source.choice([1, 2, 4, 8]), source.choice([1, 1, 2]), source.choice([1, 2])
    prompt, response = source.choice([768, 1280, 2304, 4096]), source.choice([256, 1024, 3072, 8192])
    overrides = {
        "parallel.tensor": tensor,
        "parallel.pipeline": pipeline,
        "parallel.sequence": str(tensor > 1 and source.random() < 0.7).lower(),
        "data.max_prompt_tokens": prompt,
        "train.prompts_per_step": 8 if name in ("grpo", "pairs") else 16,
    }
    if name != "pairs":
        overrides |= {
            "train.parts": f"[{source.choice(PARTS[name])}]",
            "train.recompute": source.choice(["none", "selective", "full"]),
            "train.packing": source.choice(["shared", "shared", "first_fit_decreasing"]),
            "train.tokens_per_microbatch": prompt + source.choice([1, 2, 3]) * response,
        }
    if name != "reward_model":  # whose responses are as long as the model allows
        overrides |= {"generation.max_response_tokens": response, "generation.max_requests": 8}
    if name in ("grpo", "pairs"):
        overrides["generation.responses_per_prompt"] = 4
    if name == "grpo":
        overrides |= {
            "train.updates_per_step": source.choice([1, 2]),
            "algorithm.kl_coefficient": source.choice([0.0, 0.1]),
        }
    layers = Layers(source.choice([1, 2]), pipeline * source.choice([1, 2]))
    words = tuple(f"{key}={value}" for key, value in overrides.items())
    return Case(FOLDER / f"{name}.yaml", words, layers, tensor * pipeline * data)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_random_layouts_and_lengths_take_what_is_planned(seed):
    case = random_run(seed)
    check_planned(compare(case, rehearse_case(case)))
