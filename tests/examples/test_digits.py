"""The demo's script: its commands exist, its recipes fit together, nothing held out is trained on."""

from pathlib import Path

import pytest

from examples.digits import make_data, questions
from examples.stages import read_steps
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.config.schema import Layers, Part, Precision
from tests.examples.commands import check_steps

DIGITS = Path(make_data.__file__).parent
STEPS = {step.name: step for step in read_steps(DIGITS / "run.sh")}
RECIPES = {name: load_recipe(DIGITS / f"{name}.yaml") for name in ("align", "pairs", "mpo", "grpo")}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_load_and_look_for_the_claims_that_the_data_makes(name):
    recipe = RECIPES[name]
    assert recipe.reward.claim_pattern == questions.CLAIM_PATTERN
    assert (recipe.model.layers, recipe.model.precision) == (Layers.local, Precision.fp32)
    assert recipe.train.parts == (Part.adapter,)


def test_every_step_is_a_command_that_exists_with_settings_that_exist():
    check_steps(list(STEPS.values()))


def test_recipes_name_what_the_steps_before_them_write():
    align, pairs, mpo, grpo = RECIPES.values()
    base = STEPS["base"].command[-1]
    assert {recipe.model.hf_path for recipe in RECIPES.values()} == {base}
    made = {step.command[-1] for name, step in STEPS.items() if name.startswith("shards-")}
    assert {align.data.train, align.data.validation, pairs.data.train, grpo.data.train} <= made
    assert pairs.model.checkpoint == mpo.model.checkpoint == align.run.output_dir
    assert mpo.data.train == pairs.run.output_dir
    assert grpo.model.checkpoint == mpo.run.output_dir
    assert STEPS["export"].command[STEPS["export"].command.index("--checkpoint") + 1] == grpo.run.output_dir


def test_heldout_handwriting_reaches_the_evaluations_alone():
    heldout = STEPS["shards-heldout"].command[-1]
    readers = {name for name, step in STEPS.items() for argument in step.command if heldout in argument}
    assert readers == {"shards-heldout", "evaluate-aligned", "evaluate-mpo", "evaluate-grpo"}
    assert heldout not in {recipe.data.train for recipe in RECIPES.values()} | {RECIPES["align"].data.validation}
    assert make_data.HANDWRITING["grpo"] == make_data.HANDWRITING["align"] == "train"


def test_evaluations_differ_in_name_and_weights_alone():
    commands = [STEPS[f"evaluate-{name}"].command for name in ("aligned", "mpo", "grpo")]
    for position, arguments in enumerate(zip(*commands, strict=True)):
        if len(set(arguments)) > 1:
            assert commands[0][position - 1] == "--name" or all(a.startswith("model.checkpoint=") for a in arguments)
