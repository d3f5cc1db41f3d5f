"""The command line of the entry points: its help, its advice, and where it finds fault."""

import json
import subprocess
import sys

import pytest

from megatron_r1v2.config.command_line import describe_settings, parse_command_line
from megatron_r1v2.config.load import settings_of
from megatron_r1v2.config.schema import RunRecipe

TEXT_CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16384,
}


@pytest.fixture
def recipe_path(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": TEXT_CONFIG}), encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{hf_path: {tmp_path}}}\ndata: {{train: {tmp_path}}}\n", encoding="utf-8")
    return path


def test_a_good_command_line_gives_the_settings(recipe_path):
    recipe = parse_command_line([str(recipe_path), "train.steps=3", "parallel.tensor=2"], "grpo")
    assert (recipe.train.steps, recipe.parallel.tensor) == (3, 2)


def test_an_evaluation_needs_no_recipe(tmp_path):
    endpoint = ["evaluation.endpoint_url=http://127.0.0.1:8000/v1", "evaluation.endpoint_model=r1v2"]
    recipe = parse_command_line([f"evaluation.data={tmp_path}", *endpoint, "evaluation.runs=2"], "evaluate")
    assert (recipe.evaluation.data, recipe.evaluation.runs) == (str(tmp_path), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no recipe given"),
        (["train.steps=3"], "the first argument must be a recipe, got 'train.steps=3'"),
        (["--steps"], "the first argument must be a recipe"),
        (["nowhere.yaml"], "'nowhere.yaml' is not a file"),
        (["RECIPE", "train.stepz=3"], "did you mean 'steps'?"),
        (["RECIPE", "parallel.tensor=3"], "values that do: 1, 2, 4"),
        (["RECIPE", "generation.top_p=0.5"], "generation.top_p=0.5"),
    ],
)
def test_bad_input_ends_with_advice(recipe_path, capsys, arguments, message):
    arguments = [str(recipe_path) if argument == "RECIPE" else argument for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        parse_command_line(arguments, "grpo")
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err


def test_the_process_shows_no_traceback_and_loads_no_torch(recipe_path):
    code = (
        "import sys; from megatron_r1v2.config.command_line import parse_command_line\n"
        "assert 'torch' not in sys.modules\n"
        "parse_command_line(sys.argv[1:], 'grpo')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(recipe_path), "train.steps=x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: override 'train.steps=x': train.steps='x' is not accepted; expected a whole number "
        "(Value 'x' of type 'str' could not be converted to Integer)\n"
    )


def test_help_lists_every_setting_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_command_line(["--help"], "align")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "python -m megatron_r1v2 align RECIPE.yaml [section.key=value ...]" in printed
    lines = describe_settings().splitlines()
    for section, kind in settings_of(RunRecipe).items():
        for key in settings_of(kind):
            (position,) = (i for i, line in enumerate(lines) if line.startswith(f"  {section}.{key}  <"))
            assert lines[position + 1].startswith("      "), f"{section}.{key} has no sentence below it in the schema"
    assert "  train.parts  <list of vision | adapter | language | score>  default: [adapter]" in lines
    assert "  buffer.enabled  <true | false>  default: true" in lines
