"""Make the files of this version that every later one must read: `python -m tests.formats.make_fixtures`.

One small model and its shards, and a run each of align, mpo and grpo (with its buffer) that was stopped before its last
step. Run it only when a format gets a new number, and keep the folders of the numbers before.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from megatron_r1v2.checkpoint.megatron.run_folder import finished_checkpoints
from tests.ranks import run_ranks
from tests.stages.runs import recipe_for, run_stage

FIXTURES = Path(__file__).parent / "format-1"
STAGES = ("align", "mpo", "grpo")
STEPS = 3


def train(root: Path, stage: str) -> None:
    """Run a stage to its end."""
    overrides = (f"train.steps={STEPS}", "checkpoint.keep_last=2", "train.prompts_per_step=3")
    run_stage(recipe_for(root, root / stage, overrides, stage=stage))


def keep_unfinished(run: Path, output: Path) -> None:
    """Copy what a run has on disk just before its last step."""
    before, last = finished_checkpoints(run / "checkpoints")
    shutil.copytree(before, output / "checkpoints" / before.name)
    assert last.name > before.name
    shutil.copy(run / "recipe.yaml", output)
    if (run / "reference").is_dir():
        shutil.copytree(run / "reference", output / "reference")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join(lines[: STEPS - 1]))


def main() -> None:
    """Write the fixtures; refuse to write over those of a version that was published."""
    if FIXTURES.exists():
        sys.exit(f"{FIXTURES} exists: fixtures are never changed; give new ones a folder of their own")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for stage in STAGES:
            run_ranks(1, train, root, stage)
            keep_unfinished(root / stage, FIXTURES / stage)
        for name in ("model", "data"):
            shutil.copytree(root / name, FIXTURES / name)


if __name__ == "__main__":
    main()
