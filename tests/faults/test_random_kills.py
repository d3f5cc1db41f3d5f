"""A run killed at random points ends with the bits of one that was not: weights, optimizer, buffer, metrics.

    pytest tests/faults/test_random_kills.py --timeout 3600 --record-kills benchmarks/results/random_kills.json

runs all of them and writes down what each has come to.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from megatron_r1v2.checkpoint.megatron.run_folder import finished_checkpoints
from megatron_r1v2.resilience.files import partial_path
from tests.stages.runs import Ranks, assert_same_end, has_line, read_metrics, recipe_for

ROOT = Path(__file__).parents[2]
STEPS = 4
SETTINGS = (
    f"train.steps={STEPS}",
    "buffer.target_effective_fraction=0.95",
    "generation.max_response_tokens=12",
    "train.warmup_steps=2",
)
LAYOUTS = {
    "dp1": (1, ()),
    "dp2": (2, ()),
    "tp2": (2, ("parallel.tensor=2", "parallel.sequence=true", "train.parts=[adapter, language]")),
}
KINDS = ("line", "generation", "rollout", "save", "manifest", "published")


@dataclass(frozen=True)
class Point:
    """A time to kill: `delay` seconds after something of a step is seen on the disk."""

    kind: str
    step: int
    delay: float

    def has_come(self, run: Path) -> bool:
        """Return whether it is time, or later: something that exists for a moment only may be missed."""
        if not finished_checkpoints(run / "checkpoints"):  # the first may still be being written in the background
            return False
        unfinished = run / "unfinished" / f"step-{self.step - 1:08d}"
        saved = run / "checkpoints" / f"step-{self.step:08d}"
        partial = partial_path(saved)
        conditions: dict[str, Callable[[], bool]] = {
            "generation": unfinished.is_dir,
            "rollout": lambda: any(unfinished.glob("*.pt")),
            "save": partial.is_dir,
            "manifest": (partial / "checkpoint_manifest.json").is_file,
            "line": lambda: has_line(run, "metrics.jsonl", self.step),
            "published": saved.is_dir,
        }
        return conditions[self.kind]() or saved.is_dir()

    def surely_resumed_from(self, *, asynchronous: bool) -> int:
        """Return the step that is published for sure when it is time.

        A save waits for the one before to be published; without `checkpoint.asynchronous` the next step does too. With
        it, the checkpoint of the step before may still be being written while the next one generates.
        """
        generating = self.kind in ("generation", "rollout")
        return self.step - 2 if asynchronous and generating else self.step - 1


def random_points(seed: int) -> list[Point]:
    """Draw one point, or two to be killed at one after the other; the first leaves a checkpoint."""
    draw = random.Random(seed)
    kinds = [KINDS[seed % len(KINDS)], *draw.choices(KINDS, k=seed % 2)]
    steps = sorted(draw.choices(range(2, STEPS), k=len(kinds)))
    return [Point(kind, step, draw.uniform(0, 0.15)) for kind, step in zip(kinds, steps, strict=True)]


def kill_at(point: Point, ranks: Ranks, run: Path) -> None:
    def due() -> bool:
        if not point.has_come(run):
            return False
        time.sleep(point.delay)
        return True

    ranks.kill_when(due, seconds=240)


@pytest.fixture(scope="module")
def references(root: Path, tmp_path_factory) -> Callable[[str], Path]:
    """Return what gives the uninterrupted run of a layout, made when it is first asked for."""
    made: dict[str, Path] = {}

    def reference(layout: str) -> Path:
        if layout not in made:
            world_size, overrides = LAYOUTS[layout]
            run = tmp_path_factory.mktemp("uninterrupted") / "run"
            Ranks(recipe_for(root, run, (*SETTINGS, *overrides)), world_size).wait(seconds=240)
            assert sum(line["ssb/replayed"] for line in read_metrics(run)) > 0
            made[layout] = run
        return made[layout]

    return reference


class Record:
    """A file that says for each layout and seed where it was killed, from what it went on, and with what end."""

    def __init__(self, file: Path | None) -> None:
        self.file = file

    def add(self, layout: str, seed: int, kills: list[dict[str, object]], *, identical: bool) -> None:
        if self.file is None:
            return
        runs = json.loads(self.file.read_text())["runs"] if self.file.is_file() else {}
        runs[f"{layout}-{seed:02d}"] = {
            "kills": kills,
            "identical": identical,
            "commit": told_by_git("rev-parse", "--short", "HEAD") + ("+" if told_by_git("diff", "HEAD") else ""),
            "load_average": round(os.getloadavg()[0], 1),
        }
        same = sum(run["identical"] for run in runs.values())
        content = {"steps": STEPS, "runs": dict(sorted(runs.items())), "identical": f"{same} of {len(runs)}"}
        self.file.write_text(json.dumps(content, indent=1) + "\n")


def told_by_git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    file = request.config.getoption("--record-kills", default=None)
    return Record(Path(file) if file else None)


def slow(layout: str, seed: int) -> object:
    return pytest.param(layout, seed, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("layout", "seed"),
    [
        ("dp1", 1),
        *(slow("dp1", seed) for seed in range(20) if seed != 1),
        *(slow("dp2", seed) for seed in (2, 5, 8)),
        *(slow("tp2", seed) for seed in (2, 3, 4)),
    ],
)
def test_a_run_killed_at_random_points_ends_with_the_same_bits(
    root: Path, tmp_path: Path, references: Callable[[str], Path], record: Record, layout: str, seed: int
) -> None:
    world_size, overrides = LAYOUTS[layout]
    run = tmp_path / "run"
    recipe = recipe_for(root, run, (*SETTINGS, *overrides, f"checkpoint.asynchronous={str(seed % 2 == 0).lower()}"))
    kills: list[dict[str, object]] = []
    for point in random_points(seed):
        kill_at(point, Ranks(recipe, world_size), run)
        newest = len(finished_checkpoints(run / "checkpoints"))
        kills.append({**asdict(point), "delay": round(point.delay, 3), "resumed_from_step": newest})
        assert 0 < newest < STEPS, point
        assert newest >= point.surely_resumed_from(asynchronous=recipe.checkpoint.asynchronous), point
    log = Ranks(recipe, world_size).wait(seconds=240)
    assert f"step {newest} of {STEPS}" in log
    try:
        assert_same_end(run, references(layout), rounded=True)
    except AssertionError:
        record.add(layout, seed, kills, identical=False)
        raise
    record.add(layout, seed, kills, identical=True)
    assert list((run / "unfinished").iterdir()) == []


def test_the_points_are_of_every_kind_and_drawn_from_the_seed() -> None:
    points = [point for seed in range(20) for point in random_points(seed)]
    assert {point.kind for point in points} == set(KINDS)
    assert points == [point for seed in range(20) for point in random_points(seed)]
    assert sum(len(random_points(seed)) == 2 for seed in range(20)) == 10
