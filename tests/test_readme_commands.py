"""The README's commands and its reward function, as a reader copies them."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pyarrow
import pytest
import yaml
from PIL import Image
from pyarrow import parquet

from megatron_r1v2.__main__ import main
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.planning.known_models import KNOWN_MODELS
from tests.evaluation.published import write_mmmu
from tests.ranks import run_ranks
from tests.stages.tiny_run import write_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Sizes for a model of a few thousand parameters on a CPU; the commands themselves are those of the page.
SMALL = ("model.precision=fp32", "train.steps=1", "train.prompts_per_step=2", "generation.responses_per_prompt=2",
         "generation.max_response_tokens=4", "generation.kv_cache_gib=0.01", "generation.max_requests=4",
         "generation.feature_cache_gib=0.01", "train.warmup_steps=0", "data.max_prompt_tokens=256")  # fmt: skip


def section(heading):
    """Return the text below a heading."""
    return README.split(f"\n## {heading}")[1].split("\n## ")[0]


def block_below(heading, kind=""):
    """Return the first code block of a section."""
    return re.search(rf"```{kind}\n(.*?)```", section(heading), re.DOTALL)[1]


# Of the 38B run, from the download to the export.
STEPS = [shlex.split(step) for step in re.findall(r"^\d\. `(.*?)`", section("The 38B run"), re.MULTILINE)]


@pytest.fixture
def reader(tmp_path):
    """Return the folder of a reader: a link to the examples, rows with pictures, and a model."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    write_model(tmp_path / "MODEL")
    (tmp_path / "pictures").mkdir()
    rows = []
    for number in range(4):
        Image.new("RGB", (28, 28), (number * 60, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "a b?", "answer": str(number % 2)})
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run_command(folder, arguments):
    """Run `r1v2` in a folder; a process of `run_ranks` has everything imported."""
    os.chdir(folder)
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code or 0


def run_tool(folder, module, arguments):
    """Run a tool of `checkpoint_tools` in a folder."""
    os.chdir(folder)
    return import_module(module).main(arguments)


def test_own_data_in_three_commands_and_its_export(reader):
    commands = [line for line in block_below("Your data").splitlines() if line]
    assert len(commands) == 3
    for line in commands:
        program, command, *arguments = shlex.split(line, comments=True)
        assert program == "r1v2"
        small = SMALL if command == "grpo" else ()
        assert run_ranks(1, run_command, reader, [command, *arguments, *small]) == [0], line
    assert (reader / "runs" / "mine" / "report.html").is_file()
    # The last two commands of the 38B run, of this one.
    report, export = STEPS[6:]
    (reader / report[-1]).symlink_to("mine")
    assert report[:2] == ["r1v2", "report"]
    assert run_ranks(1, run_command, reader, report[1:]) == [0]
    assert export[:2] == ["python", "-m"]
    run_ranks(1, run_tool, reader, export[2], export[3:])
    assert any((reader / "r1v2-trained").glob("*.safetensors"))


def test_the_commands_of_the_recipe_for_own_data(reader):
    rows = [{"question": f"a b {'b ' * number}?", "answer": str(number % 2)} for number in range(12)]
    (reader / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = (ROOT / "examples/your_data/grpo.yaml").read_text(encoding="utf-8").replace("\\\n#  ", "")
    commands = re.findall(r"^#   r1v2 (.*)$", recipe, re.MULTILINE)
    assert [line.split()[0] for line in commands] == ["prepare", "evaluate", "grpo", "evaluate", "report"]
    for line in commands:
        command, *arguments = shlex.split(line)
        small = (*SMALL, "evaluation.runs=2") if command in ("grpo", "evaluate") else ()
        assert run_ranks(1, run_command, reader, [command, *arguments, *small]) == [0], line
    scored = [json.loads((reader / f"runs/mine/evaluation-{name}.json").read_text()) for name in ("before", "after")]
    assert [result["model"] for result in scored] == ["MODEL", "runs/mine"]


def test_the_reward_function_of_the_readme_is_right_near_and_wrong():
    code = block_below("Your reward", "python")
    assert len(code.splitlines()) <= 10
    names = {}
    exec(code, names)
    near = names["near"]
    texts = ("\\boxed{8}", "\\boxed{7}", "\\boxed{80}", "eight")
    assert [near(text, "8", prompt="", images=[]) for text in texts] == [1, 0.8, 0, 0]


def test_the_reward_section_of_the_readme_goes_into_the_recipe(reader, monkeypatch):
    monkeypatch.chdir(reader)
    given = yaml.safe_load(block_below("Your reward", "yaml"))
    recipe = yaml.safe_load((ROOT / "examples/your_data/grpo.yaml").read_text())
    recipe["reward"] |= given["reward"]
    (reader / "mine.yaml").write_text(yaml.safe_dump(recipe))
    (function,) = load_recipe(reader / "mine.yaml").reward.functions
    assert (function.path, function.name, function.weight) == ("mine.py", "near", 0.5)


def test_the_38b_run_in_eight_commands(reader):
    """Its folder is a tiny model's, and then the configuration alone; report and export are tested with a run."""
    assert [step[1 if step[0] == "r1v2" else 0] for step in STEPS] == [
        "hf", "prepare", "prepare", "plan", "rehearse", "R1V2_RECIPE=examples/r1v2_38b/grpo_from_skywork.yaml",
        "report", "python",
    ]  # fmt: skip
    download, *prepares, plan, rehearse, submit, _, _ = STEPS
    told = subprocess.run([Path(sys.executable).with_name("hf"), *download[1:2], "--help"], capture_output=True)
    assert b"--local-dir" in told.stdout
    folder = reader / download[-1]
    write_model(folder)
    picture = io.BytesIO()
    Image.new("RGB", (28, 28), "red").save(picture, "PNG")
    row = {"problem": "a b?", "answer": "1", "images": [{"bytes": picture.getvalue(), "path": None}]}
    for step in prepares:
        parquet.write_table(pyarrow.Table.from_pylist([row] * 3), reader / step[2])
        assert run_ranks(1, run_command, reader, step[1:]) == [0]
    recipe = load_recipe(ROOT / plan[2])
    outputs = [step[step.index("--output") + 1] for step in prepares]
    assert [recipe.data.train, recipe.data.validation] == outputs
    assert recipe.model.hf_path == download[-1]
    assert recipe.run.output_dir == STEPS[6][-1] == STEPS[7][4]
    for path in folder.iterdir():
        path.unlink()
    (folder / "config.json").write_text(json.dumps(KNOWN_MODELS["r1v2-38b"]))
    assert run_ranks(1, run_command, reader, plan[1:]) == [0]
    assert run_ranks(1, run_command, reader, rehearse[1:]) == [2], "rows are measured by a tokenizer, which is gone"
    assert submit[1] == "sbatch"
    environment = {"PATH": f"{reader}:{os.environ['PATH']}", **dict([submit[0].split("=", 1)])}
    (reader / "python").write_text('#!/bin/sh\necho "$@"\n')
    (reader / "python").chmod(0o755)
    done = subprocess.run(["bash", ROOT / submit[2]], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"-m megatron_r1v2 rehearse {plan[2]} --gpus 8 ")


def test_a_benchmark_is_scored_by_two_commands(reader):
    write_mmmu(reader / "downloads" / "MMMU")
    commands = [shlex.split(line, comments=True) for line in block_below("Serve and score").splitlines()]
    assert [command[:2] for command in commands] == [
        ["vllm", "serve"], ["r1v2", "serve"], ["r1v2", "benchmarks"], ["r1v2", "evaluate"],
    ]  # fmt: skip
    for _, command, *arguments in commands[2:]:
        small = (
            (*SMALL[:1], *SMALL[4:8], "evaluation.runs=1", "data.max_prompt_tokens=1500")
            if command == "evaluate"
            else ()
        )
        assert run_ranks(1, run_command, reader, [command, *arguments, *small]) == [0]
    assert json.loads((reader / "runs/r1v2/evaluation-mmmu.json").read_text())["model"] == "MODEL"
