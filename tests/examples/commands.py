"""Checks and runs of the commands that an example's script shows."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.stages import Stage
from megatron_r1v2.__main__ import COMMANDS
from megatron_r1v2.config.load import load_recipe, load_recipe_as
from megatron_r1v2.config.recipes import EvaluateRecipe

ROOT = Path(__file__).parents[2]


def run_script(folder: Path, script: str, *arguments: str) -> Path:
    """Run an example's script in a folder of links to the repository, so that it writes below that folder.

    Returns:
        The example's folder, runs/EXAMPLE.
    """
    for entry in ROOT.iterdir():
        if entry.name not in (".git", "runs"):
            (folder / entry.name).symlink_to(entry)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["bash", script, *arguments], cwd=folder, check=True, env={**os.environ, "PATH": path})
    return folder / "runs" / Path(script).parent.name


def check_steps(steps: Sequence[Stage]) -> None:
    """Check that each step has its own name and runs a command that exists, on a recipe with settings that exist."""
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        program, *arguments = step.command
        if program != "r1v2":
            module = arguments[arguments.index("-m") + 1]
            assert importlib.util.find_spec(module), step
            arguments = arguments[arguments.index("-m") + 2 :]
            if module != "megatron_r1v2":
                continue
        assert arguments[0] in COMMANDS, step
        recipes = [argument for argument in arguments if argument.endswith(".yaml")]
        if not recipes:
            continue
        overrides = [argument for argument in arguments if "=" in argument]
        assert Path(recipes[0]).is_file()
        if arguments[0] == "evaluate":
            load_recipe_as(EvaluateRecipe, recipes[0], overrides)
        else:
            load_recipe(recipes[0], overrides)
