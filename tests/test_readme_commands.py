"""The README's commands for own data, and its reward function, as a reader copies them."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from megatron_r1v2.__main__ import main
from tests.ranks import run_ranks
from tests.stages.tiny_run import write_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Sizes for a model of a few thousand parameters on a CPU; the commands themselves are those of the page.
SMALL = ("model.precision=fp32", "train.steps=1", "train.prompts_per_step=2", "generation.responses_per_prompt=2",
         "generation.max_response_tokens=4", "generation.kv_cache_gib=0.01", "generation.max_requests=4",
         "generation.feature_cache_gib=0.01", "train.warmup_steps=0", "data.max_prompt_tokens=256")  # fmt: skip


def block_below(heading, kind=""):
    """Return the first code block of a section."""
    section = README.split(f"\n## {heading}")[1].split("\n## ")[0]
    return re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL)[1]


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


def test_own_data_in_three_commands(reader):
    commands = [line for line in block_below("Your data").splitlines() if line]
    assert len(commands) == 3
    for line in commands:
        program, command, *arguments = shlex.split(line, comments=True)
        assert program == "r1v2"
        small = SMALL if command == "grpo" else ()
        assert run_ranks(1, run_command, reader, [command, *arguments, *small]) == [0], line
    assert (reader / "runs" / "mine" / "report.html").is_file()


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
