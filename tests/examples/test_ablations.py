from pathlib import Path

import pytest

from examples.digits import ablation_tables, ablations
from megatron_r1v2.__main__ import COMMANDS
from megatron_r1v2.config.load import load_recipe, load_recipe_as
from megatron_r1v2.config.recipes import EvaluateRecipe

ROOT = Path("runs/digits-ablations")


def every_chain() -> list[list]:
    seeds = (1, 2)
    chains = [ablations.start_chain(ROOT, seed) for seed in seeds]
    return chains + [chain for seed in seeds for chain in ablations.chains(ROOT, seed, ablation_tables.TABLES, ())]


def test_every_run_has_its_own_name_and_folder_and_settings_that_exist():
    names, folders = [], []
    for chain in every_chain():
        for stage in chain:
            names.append(stage.name)
            program, *arguments = stage.command
            assert (program, arguments[0] in COMMANDS) == ("r1v2", True)
            (recipe,) = (argument for argument in arguments if argument.endswith(".yaml"))
            overrides = [argument for argument in arguments if "=" in argument]
            if arguments[0] == "evaluate":
                load_recipe_as(EvaluateRecipe, recipe, overrides)
                continue
            settings = load_recipe(recipe, overrides)
            if arguments[0] != "pairs":
                folders.append(settings.run.output_dir)
    assert len(set(names)) == len(names)
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("arm", ablations.ARMS, ids=lambda arm: arm.name)
def test_an_arm_differs_from_the_first_of_its_stage_in_its_own_settings_alone(arm):
    first = next(other for other in ablations.ARMS if other.stage == arm.stage)
    commands = [set(ablations.arm_chain(ROOT, 1, each, ())[0].command) for each in (first, arm)]
    own = {*arm.settings, f"run.output_dir={ROOT}/seed-1/{arm.name}"}
    assert commands[1] - commands[0] <= own <= commands[1]


def test_arms_start_from_what_the_first_chain_of_a_seed_makes():
    first = ablations.start_chain(ROOT, 1)
    made = {setting.split("=")[1] for stage in first for setting in stage.command if "output" in setting}
    for arm in ablations.ARMS[1:]:
        (start,) = (s for s in ablations.arm_chain(ROOT, 1, arm, ())[0].command if s.startswith("model.checkpoint="))
        assert start.split("=")[1] in made
    names = [chain[0].name for chain in ablations.chains(ROOT, 1, ["stages"], ())]
    assert names == ["seed-1-ssb-grpo", "seed-1-sft-mpo", "seed-1-dpo-mpo"]


def test_what_all_arms_share_is_what_the_demo_makes_before_its_adapter_learns():
    steps = ablations.shared_steps(ROOT)
    assert [step.name for step in steps][:1] + [step.name for step in steps][-1:] == ["data", "base"]
    made = [argument for step in steps for argument in step.command if argument.startswith("runs/")]
    assert made
    assert all(path.startswith(f"{ROOT}/") for path in made)


def test_arms_belong_to_tables_that_exist():
    assert {table for arm in ablations.ARMS for table in arm.tables} <= set(ablation_tables.TABLES)
    assert len({arm.label for arm in ablations.ARMS}) == len(ablations.ARMS)


def test_only_finished_runs_are_in_a_table(tmp_path):
    done = ablations.seed_folder(tmp_path, 1) / "ssb"
    done.mkdir(parents=True)
    (done / "evaluation-heldout.json").write_text("{}")
    found = ablations.arm_folders(tmp_path, (1, 2), "rollouts")
    assert {label: len(folders) for label, folders in found.items() if folders} == {
        "MPO, then GRPO with SSB (adapter only)": 1
    }
    assert "adapter and vision tower" not in found
