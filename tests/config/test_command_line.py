"""The command line of the stages: its help, its advice, and where it finds fault."""

import json
import subprocess
import sys

import pytest

from megatron_r1v2.config.command_line import (
    command_parser,
    describe_settings,
    parse_command_line,
    select_entries,
    tell_bad_input,
)
from megatron_r1v2.config.recipes import (
    STAGES,
    EvaluateRecipe,
    GrpoRecipe,
    MpoRecipe,
    RewardModelRecipe,
    every_section,
)
from megatron_r1v2.config.validate import read_hf_config

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
    path.write_text(
        f"run: {{stage: grpo}}\nmodel: {{hf_path: {tmp_path}}}\ndata: {{train: {tmp_path}}}\n", encoding="utf-8"
    )
    return path


def test_a_good_command_line_gives_the_settings(recipe_path):
    recipe = parse_command_line([str(recipe_path), "train.steps=3", "parallel.tensor=2"], GrpoRecipe)
    assert (recipe.train.steps, recipe.parallel.tensor) == (3, 2)


def test_an_evaluation_needs_no_recipe(tmp_path):
    endpoint = ["evaluation.endpoint_url=http://127.0.0.1:8000/v1", "evaluation.endpoint_model=r1v2"]
    recipe = parse_command_line([f"evaluation.data={tmp_path}", *endpoint, "evaluation.runs=2"], EvaluateRecipe)
    assert (recipe.evaluation.data, recipe.evaluation.runs) == (str(tmp_path), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no recipe given"),
        (["train.steps=3"], "the first argument must be a recipe, got 'train.steps=3'"),
        (["--steps"], "the first argument must be a recipe"),
        (["nowhere.yaml"], "'nowhere.yaml' is not a file"),
        (["RECIPE", "train.stepz=3"], "did you mean 'train.steps'?"),
        (["RECIPE", "generation.responses_per_prompt=1"], "generation.responses_per_prompt=1"),
    ],
)
def test_bad_input_ends_with_advice(recipe_path, capsys, arguments, message):
    arguments = [str(recipe_path) if argument == "RECIPE" else argument for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        parse_command_line(arguments, GrpoRecipe)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err


def test_further_checks_are_told_with_the_mistakes_of_the_recipe(recipe_path, capsys):
    with pytest.raises(SystemExit):
        parse_command_line(
            [str(recipe_path), "train.steps=0"], GrpoRecipe, lambda recipe: [f"{recipe.title()}: no GPU"]
        )
    assert capsys.readouterr().err.splitlines() == [
        "error: 2 mistakes",
        "  override 'train.steps=0': train.steps=0 is out of range; accepted: 1 or more",
        "  grpo: no GPU",
    ]


def test_the_process_shows_no_traceback_and_loads_no_torch(recipe_path):
    code = (
        "import sys; from megatron_r1v2.config.command_line import parse_command_line\n"
        "from megatron_r1v2.config.recipes import GrpoRecipe\n"
        "assert 'torch' not in sys.modules\n"
        "parse_command_line(sys.argv[1:], GrpoRecipe)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(recipe_path), "train.steps=x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: override 'train.steps=x': train.steps='x' is not accepted; expected a whole number\n"
    )


def help_of(capsys, kind, *words):
    with pytest.raises(SystemExit) as ended:
        parse_command_line(["--help", *words], kind)
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", [*STAGES.values(), EvaluateRecipe])
def test_help_says_what_a_stage_does_and_shows_its_own_settings_alone(capsys, kind):
    printed = help_of(capsys, kind)
    command = kind.title().replace("_", "-")
    assert f"python -m megatron_r1v2 {command} " in printed
    assert kind.purpose() in printed
    lines = printed.splitlines()
    for name, section in every_section().items():
        read = kind.settings().get(name, ())
        assert any(line.startswith(f"{name}: ") for line in lines) == bool(read)
        for key in section.model_fields:
            found = [i for i, line in enumerate(lines) if line.startswith(f"  {name}.{key}  <")]
            assert len(found) == (key in read), key
            assert all(lines[i + 1].startswith("      ") for i in found), f"{name}.{key} has no sentence below it"


def test_help_shows_what_is_accepted_and_the_default():
    lines = describe_settings(GrpoRecipe).splitlines()
    assert "  train.parts  <a list, each one of vision, adapter, language, score>  default: [adapter]" in lines
    assert "  checkpoint.asynchronous  <true or false>  default: true" in lines
    assert "  train.steps  <a whole number, 1 or more>  default: 100" in lines
    assert "  run.output_dir  <text>  default: 'runs/r1v2'" in lines
    assert "  model.layers  <one of local, te>  default: local" in lines
    heads = [line for line in describe_settings(RewardModelRecipe).splitlines() if "train.parts  <" in line]
    assert heads[0].endswith("default: [adapter, score]"), "the default of the stage"


def test_help_with_a_word_shows_the_settings_that_contain_it(capsys):
    named = [line.split()[0] for line in help_of(capsys, GrpoRecipe, "clip_").splitlines() if line.startswith("  al")]
    assert named == ["algorithm.clip_low", "algorithm.clip_high"]
    printed = help_of(capsys, GrpoRecipe, "DAPO")
    assert "algorithm.dynamic_sampling_rounds" in printed, "in its meaning"
    assert "usage" not in printed
    assert help_of(capsys, MpoRecipe, "dapo") == "no setting of mpo has 'dapo' in its name or its meaning\n"


def test_help_with_several_words_shows_what_contains_any_of_them(capsys):
    printed = help_of(capsys, GrpoRecipe, "max_age", "KL(policy")
    assert [line.split()[0] for line in printed.splitlines() if line.startswith("  ") and "<" in line] == [
        "algorithm.kl_coefficient",
        "buffer.max_age",
    ]
    assert (
        help_of(capsys, MpoRecipe, "dapo", "ssb")
        == "no setting of mpo has 'dapo' or 'ssb' in its name or its meaning\n"
    )


def test_every_setting_is_described_with_its_stages():
    lines = [line for line in describe_settings().splitlines() if line[:2] == "  " != line[2:4]]
    assert [line.split()[0] for line in lines] == [
        f"{name}.{key}" for name, section in every_section().items() for key in section.model_fields
    ]
    assert next(line for line in lines if "min_margin" in line).endswith("  in: mpo")
    assert next(line for line in lines if "judge_url" in line).endswith("  in: evaluate")


def test_an_entry_is_shown_whole_and_below_its_heading():
    text = "first:\n\n  a.b  <text>\n      One\n      two.\n  c.d\n\nsecond:\n\n  --e E  three"
    assert select_entries(text, ["TWO"], of="it") == "first:\n\n  a.b  <text>\n      One\n      two."
    assert select_entries(text, ["one two", "three"], of="it").splitlines()[-3:] == ["second:", "", "  --e E  three"]
    assert select_entries(text, ["first"], of="it") == "no setting of it has 'first' in its name or its meaning"


def test_a_parser_shows_the_options_and_settings_that_contain_a_word(capsys):
    parser = command_parser(
        "plan", "Words of no option.", settings=lambda: "part: A.\n\n  part.x  <text>\n      Words."
    )
    parser.add_argument("--some", help="with words")
    parser.add_argument("--other", help="without")
    parser.add_argument("needed")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help", "words", "nothing"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "--some" in printed
    assert "part.x" in printed
    for hidden in ("--other", "usage", "of no option", "needed"):
        assert hidden not in printed


def test_a_parser_names_its_command(capsys):
    with pytest.raises(SystemExit):
        command_parser("plan", "What it does.\n  As it stands.", epilog="The end.").parse_args(["-h"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: python -m megatron_r1v2 plan ")
    assert "What it does.\n  As it stands." in printed
    assert printed.endswith("The end.\n")


def test_our_own_errors_are_told_and_those_of_a_library_keep_their_traceback(capsys):
    with pytest.raises(SystemExit) as ended, tell_bad_input():
        read_hf_config("nowhere")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(ValueError, match="invalid literal"), tell_bad_input():
        int("x")
