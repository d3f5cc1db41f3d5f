"""GRPO of examples/digits on this device, on the components and questions that `make gpu-carry` has put beside it.

    python -m benchmarks.gpu_demo .gpu/demo figures.json

The folder has a recipe.yaml whose paths are in it. The metrics of each step are in the file as soon as they are known.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_r1v2.resilience.files import write_file

RECIPE = "recipe.yaml"
# `r1v2 grpo` less the report of the run, whose charts a bare machine cannot draw.
_STAGE = """
import sys
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.stages.grpo.stage import run_grpo

run_grpo(load_recipe(sys.argv[1], sys.argv[2:]))
"""


def read_steps(metrics: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a run's metrics."""
    if not metrics.is_file():
        return []
    return [
        json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"
    ]


def demo_settings(run: Path, steps: int) -> tuple[str, ...]:
    """Return what a report changes of the recipe.

    Args:
        run: the folder of the run.
    """
    return (f"run.output_dir={run}", f"train.steps={steps}", "train.warmup_steps=1", "checkpoint.every_steps=0")


def run_demo(folder: Path, output: Path, steps: int) -> int:
    """Run the stage, and return its exit status."""
    with tempfile.TemporaryDirectory(prefix="r1v2-demo-") as name:
        run = Path(name) / "run"
        command = [sys.executable, "-c", _STAGE, str(folder / RECIPE), *demo_settings(run, steps)]
        start = time.monotonic()
        process = subprocess.Popen(command)
        count = 0
        while True:
            ended = process.poll() is not None
            lines = read_steps(run / "metrics.jsonl")
            if len(lines) > count or ended:
                count = len(lines)
                write_file(output, json.dumps({"seconds": time.monotonic() - start, "steps": lines}))
            if ended:
                return process.returncode
            time.sleep(0.5)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_demo", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args(argv)
    return run_demo(arguments.folder, arguments.output, arguments.steps)


if __name__ == "__main__":
    sys.exit(main())
