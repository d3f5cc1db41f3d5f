import importlib.util
import json
from pathlib import Path

import pytest
from rich.console import Console

from examples import whole_run
from examples.digits import make_data, questions, run_demo
from examples.stages import Stage
from megatron_r1v2.__main__ import COMMANDS
from megatron_r1v2.config.load import load_recipe, load_recipe_as
from megatron_r1v2.config.recipes import EvaluateRecipe
from megatron_r1v2.config.schema import Layers, Part, Precision


def every_stage(root: Path) -> list[Stage]:
    paths = run_demo.demo_paths(root)
    return [
        run_demo.data_stage(paths, 1),
        *run_demo.component_stages(paths, 1),
        *whole_run.shard_stages(paths, run_demo.IMAGE_SETS),
        whole_run.base_stage(paths),
        run_demo.align_stage(paths, 1, ()),
        whole_run.evaluation_stage(paths, 1, "aligned", paths.align, ["train.steps=7"]),
        run_demo.pairs_stage(paths, 1),
        run_demo.mpo_stage(paths, 1, ()),
        whole_run.evaluation_stage(paths, 1, "mpo", paths.mpo, ["train.steps=7"]),
        whole_run.grpo_stage(paths, 1, paths.mpo, ["train.steps=7"]),
        whole_run.evaluation_stage(paths, 1, "grpo", paths.grpo, ["train.steps=7"]),
        *whole_run.closing_stages(paths),
    ]


@pytest.mark.parametrize("name", ["align", "pairs", "mpo", "grpo"])
def test_recipes_load_and_look_for_the_claims_that_the_data_makes(name):
    recipe = load_recipe(run_demo.RECIPES / f"{name}.yaml")
    assert recipe.reward.claim_pattern == questions.CLAIM_PATTERN
    assert (recipe.model.layers, recipe.model.precision) == (Layers.local, Precision.fp32)
    assert recipe.train.parts == (Part.adapter,)


def test_recipes_point_to_where_the_demo_writes_by_default():
    paths = run_demo.demo_paths(Path("runs/digits"))
    names = ("align", "pairs", "mpo", "grpo")
    align, pairs, mpo, grpo = (load_recipe(run_demo.RECIPES / f"{name}.yaml") for name in names)
    for recipe in (align, pairs, mpo, grpo):
        assert recipe.model.hf_path == str(paths.base)
    assert [recipe.run.output_dir for recipe in (align, mpo, grpo)] == list(
        map(str, (paths.align, paths.mpo, paths.grpo))
    )
    assert pairs.model.checkpoint == mpo.model.checkpoint == str(paths.align)
    assert grpo.model.checkpoint == str(paths.mpo)
    assert (align.data.train, grpo.data.train) == (str(paths.shards / "align"), str(paths.shards / "grpo"))
    assert pairs.data.train == str(paths.shards / "prefer")
    assert pairs.run.output_dir == mpo.data.train == str(paths.pairs)
    assert align.data.validation == str(paths.shards / "validation")


def test_heldout_handwriting_reaches_the_evaluations_alone(tmp_path):
    heldout = str(tmp_path / "shards" / "heldout")
    for stage in every_stage(tmp_path):
        settings = [argument for argument in stage.command if heldout in argument]
        if stage.name == "shards-heldout":
            continue
        assert all(setting.startswith("evaluation.data=") for setting in settings), stage
        if stage.name == "align":
            assert settings == []
    assert make_data.HANDWRITING["grpo"] == make_data.HANDWRITING["align"] == "train"


def test_every_stage_runs_a_module_that_exists_with_settings_that_exist(tmp_path):
    names = []
    for stage in every_stage(tmp_path):
        names.append(stage.name)
        module, *arguments = stage.command
        assert importlib.util.find_spec(module), module
        assert module != "megatron_r1v2" or arguments[0] in COMMANDS, arguments[0]
        recipes = [argument for argument in arguments if argument.endswith(".yaml")]
        if recipes:
            overrides = [argument for argument in arguments if "=" in argument]
            if arguments[0] == "evaluate":
                load_recipe_as(EvaluateRecipe, recipes[0], overrides)
            else:
                load_recipe(recipes[0], overrides)
    assert len(set(names)) == len(names)


def test_evaluations_differ_in_the_weights_alone(tmp_path):
    paths = run_demo.demo_paths(tmp_path)
    before = whole_run.evaluation_stage(paths, 1, "aligned", paths.align, ())
    after = whole_run.evaluation_stage(paths, 1, "grpo", paths.grpo, ())
    changed = [pair for pair in zip(before.command, after.command, strict=True) if pair[0] != pair[1]]
    assert changed == [
        ("aligned", "grpo"),
        (f"model.checkpoint={paths.align}", f"model.checkpoint={paths.grpo}"),
    ]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(0.35, 0.85, []), (0.60, 0.99, []), (0.34, 0.9, ["34.0%"]), (0.61, 0.84, ["61.0%", "84.0%"])],
)
def test_the_demo_says_what_is_not_as_promised(before, after, expected):
    lines = run_demo.remarks(before, after)
    assert len(lines) == len(expected)
    for line, number in zip(lines, expected, strict=True):
        assert number in line


def test_the_buffer_table_compares_the_first_and_the_last_third(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    fractions = [0.6, 0.6, 0.4, 0.4, 0.1, 0.3]
    lines = [json.dumps({"step": i, "ssb/fresh_effective_fraction": f}) for i, f in enumerate(fractions)]
    metrics.write_text("\n".join(lines) + "\n")
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    console.print(whole_run.buffer_table(metrics))
    row = next(line for line in console.export_text().splitlines() if "fresh" in line)
    assert [cell.strip() for cell in row.split("\u2502")[2:4]] == ["0.6", "0.2"]
