"""When does the Selective Sample Buffer pay? GRPO on handwritten digits with and without it, at equal responses.

    regime     prompts of which about 50, 25 and 10 % teach, each with and without the buffer (ablation_regimes.py)
    target     buffer.target_effective_fraction 0 (no buffer), 0.3, 0.6, 0.9
    age        buffer.max_age 2, 5, 20
    exponent   buffer.priority_exponent 0, 1, 2

One thing at a time differs from the default: middle regime, target 0.6, age 20, exponent 1. Every run starts from the
same model (after MPO) and generates the same number of responses. The learning rate of each arm is the best of three
on seed 0; seeds 1 to 5, which differ in data order and sampling, are reported at that rate. The arms come in the order
above, each with all of its seeds, so a budget that ends early leaves whole comparisons.

State is in the folder: finished runs are not run again, so the command that was interrupted, or whose hours were up,
goes on when it is given again. It writes table-buffer.md and .json after each pair of arms.

python -m examples.digits.ablation_buffer --output runs/digits-ablations --budget-hours 4
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from examples.digits import ablation_buffer_table as table
from examples.digits import ablations
from examples.stages import Stage, StageError, StageRunner

STEPS = 60
PROMPTS_PER_STEP = 24
VALIDATE_EVERY = 6
VALIDATION_RUNS = 2
"""Responses to each of 256 prompts: one leaves more noise than the arms differ by."""
POOL_RUNS = 48
"""Responses to a prompt: forty sort it, and a group of GRPO measures how often it teaches.

Of the prompts that sixteen sorted as settled, 24 % taught in the next eight: too many for the hard regime.
"""
LEARNING_RATES = (1.6e-4, 3.2e-4, 6.4e-4)
TUNING_SEED = 0
SEEDS = (1, 2, 3, 4, 5)
DEFAULT = "middle"
FIRST_GUESS_SECONDS = 200.0
"""Of a run, before one has been measured: on a busy machine it took 171 s with half of the validation."""


@dataclass(frozen=True)
class Arm:
    """A row of the table.

    Example: Arm("hard", "hard, buffer", "hard", reference="hard-plain").
    """

    name: str
    label: str
    regime: str = DEFAULT
    settings: tuple[str, ...] = ()
    reference: str = DEFAULT
    """The arm that it is compared with, seed by seed; itself: none."""


def _regime_arms() -> Iterator[Arm]:
    for regime in (DEFAULT, "hard", "easy"):
        yield Arm(f"{regime}-plain", f"{regime}: no buffer", regime, ("buffer.capacity=0",), f"{regime}-plain")
        yield Arm(regime, f"{regime}: buffer", regime, reference=f"{regime}-plain")


def _middle_arms(setting: str, *values: float) -> Iterator[Arm]:
    short = setting.rpartition("_")[2]
    for value in values:
        yield Arm(f"{short}-{value:g}", f"{DEFAULT}: {setting}={value:g}", settings=(f"buffer.{setting}={value:g}",))


ARMS = (
    *_regime_arms(),
    *_middle_arms("target_effective_fraction", 0.3, 0.9),
    *_middle_arms("max_age", 2, 5),
    *_middle_arms("priority_exponent", 0, 2),
)


@dataclass(frozen=True)
class Study:
    """The folder of a study, and the sizes of its runs."""

    root: Path
    steps: int = STEPS
    overrides: tuple[str, ...] = ()
    """Settings of every run."""

    @property
    def start(self) -> Path:
        """Return the run whose model all arms start from."""
        return ablations.seed_folder(self.root, ablations.FIRST_SEED) / ablations.FIRST_ARM.name

    @property
    def regimes(self) -> Path:
        """Return the folder of the prompts of each regime."""
        return self.root / "buffer" / "regimes"

    def run_folder(self, arm: str, rate: float, seed: int) -> Path:
        """Return the folder of a run."""
        return self.root / "buffer" / f"{arm}-{rate:g}" / f"seed-{seed}"

    def before_stages(self) -> list[Stage]:
        """Return what comes before the arms: the model after MPO, its responses to the prompts, and the regimes."""
        pool = self.root / "buffer" / "pool"
        data = self.root / "shards" / "grpo"
        settings = (f"model.checkpoint={self.start}", f"evaluation.data={data}", f"evaluation.runs={POOL_RUNS}")
        _, _, recipe, *given = ablations.arm_stage(
            self.root, ablations.FIRST_SEED, "pool", "grpo", pool, settings
        ).command
        sort = ("python", "-m", "examples.digits.ablation_regimes", str(pool / "evaluation-pool.rollouts.jsonl"))
        return [
            *ablations.shared_steps(self.root),
            *ablations.start_chain(self.root, ablations.FIRST_SEED),
            Stage("buffer-pool", ("r1v2", "evaluate", recipe, "--name", "pool", *given)),
            Stage("buffer-regimes", (*sort, "--data", str(data), "--output", str(self.regimes))),
        ]

    def stage(self, arm: Arm, rate: float, seed: int) -> Stage:
        """Return the run of an arm at a learning rate."""
        settings = (
            f"model.checkpoint={self.start}",
            f"data.train={self.regimes / arm.regime}",
            f"data.validation={self.root / 'shards' / 'validation'}",
            f"train.steps={self.steps}",
            f"train.prompts_per_step={PROMPTS_PER_STEP}",
            f"train.learning_rate={rate:g}",
            # The same schedule at every rate, as in grpo.yaml.
            f"train.min_learning_rate={0.7 * rate:g}",
            "checkpoint.every_steps=0",
            f"evaluation.every_steps={VALIDATE_EVERY}",
            f"evaluation.runs={VALIDATION_RUNS}",
            *arm.settings,
            *self.overrides,
        )
        folder = self.run_folder(arm.name, rate, seed)
        command = ablations.arm_stage(self.root, seed, arm.name, "grpo", folder, settings).command
        return Stage(f"buffer-{arm.name}-{rate:g}-seed-{seed}", command)

    def best_rate(self, arm: Arm) -> float:
        """Return the learning rate of an arm that was best on the tuning seed.

        Raises:
            FileNotFoundError: it has not been tuned yet.
        """
        late = {rate: table.late_pass_at_1(self.run_folder(arm.name, rate, TUNING_SEED)) for rate in LEARNING_RATES}
        return max(late, key=lambda rate: late[rate])

    def is_done(self, stage: Stage) -> bool:
        """Return whether a stage has finished."""
        return self._record(stage).is_file()

    def spent_hours(self, jobs: int) -> float:
        """Return the hours of all finished stages, with so many of them at a time."""
        records = (self.root / "stages").glob("*.json")
        return sum(json.loads(record.read_text(encoding="utf-8"))["seconds"] for record in records) / jobs / 3600

    def run_seconds(self) -> float:
        """Return how long a run takes, by those that have finished."""
        done = [
            json.loads(record.read_text(encoding="utf-8"))["seconds"]
            for record in (self.root / "stages").glob("buffer-*-seed-*.json")
        ]
        return statistics.median(done) if done else FIRST_GUESS_SECONDS

    def _record(self, stage: Stage) -> Path:
        return self.root / "stages" / f"{stage.name}.json"


class BudgetSpent(Exception):
    """The next runs would end after the hours are up."""


def waves(study: Study, arms: Sequence[Arm]) -> Iterator[tuple[list[Arm], list[Stage]]]:
    """Yield runs that may go side by side, with their arms: two arms are tuned, then their seeds follow.

    The learning rate of the seeds is read when they are asked for, after the runs before have finished.
    """
    for first in range(0, len(arms), 2):
        pair = list(arms[first : first + 2])
        yield pair, [study.stage(arm, rate, TUNING_SEED) for rate in LEARNING_RATES for arm in pair]
        yield pair, [study.stage(arm, study.best_rate(arm), seed) for seed in SEEDS for arm in pair]


def run_study(study: Study, runner: StageRunner, *, arms: Sequence[Arm], jobs: int, budget_hours: float) -> None:
    """Run arms until all are done or the hours are up.

    Args:
        budget_hours: of all calls together; 0: no end.

    Raises:
        BudgetSpent: the hours are up; what has finished stays.
        StageError: a stage failed; what has finished stays.
    """
    for stage in study.before_stages():
        runner.run(stage)
    for _, stages in waves(study, arms):
        done = [stage for stage in stages if study.is_done(stage)]
        # Runs nothing, but refuses runs of other settings, such as another --steps.
        runner.run_chains([[stage] for stage in done], at_once=jobs)
        todo = [stage for stage in stages if stage not in done]
        # As many as run side by side at a time: the budget is asked before each.
        for first in range(0, len(todo), jobs):
            if budget_hours and study.spent_hours(jobs) + study.run_seconds() / 3600 > budget_hours:
                raise BudgetSpent(
                    f"{study.spent_hours(jobs):.2f} of {budget_hours:g} hours are spent and a run takes "
                    f"{study.run_seconds():.0f} s; go on with a larger --budget-hours. Next: {todo[first].name}"
                )
            runner.run_chains([[stage] for stage in todo[first : first + jobs]], at_once=jobs)
        write_results(study, arms)


def write_results(study: Study, arms: Sequence[Arm]) -> str:
    """Write the table of the arms that have been tuned, and return it."""
    rows = {}
    for arm in arms:
        try:
            rate = study.best_rate(arm)
        except FileNotFoundError:
            continue
        runs = {seed: study.run_folder(arm.name, rate, seed) for seed in SEEDS}
        finished = {seed: run for seed, run in runs.items() if study.is_done(study.stage(arm, rate, seed))}
        rows[arm.name] = table.ArmRuns(arm.label, rate, finished, arm.reference)
    return table.write_table(study.root, rows)


def plan(study: Study, arms: Sequence[Arm], jobs: int) -> str:
    """Return what is left to run, in its order, and for how long."""
    left = [stage for stage in study.before_stages() if not study.is_done(stage)]
    lines = [f"before the arms: {len(left)} of {len(study.before_stages())} stages are left"]
    num_runs, seconds = 0, study.run_seconds()
    for first in range(0, len(arms), 2):
        pair = arms[first : first + 2]
        tuning = [study.stage(arm, rate, TUNING_SEED) for arm in pair for rate in LEARNING_RATES]
        untuned = sum(not study.is_done(stage) for stage in tuning)
        seeds = len(pair) * len(SEEDS)
        if not untuned:
            runs = [study.stage(arm, study.best_rate(arm), seed) for arm in pair for seed in SEEDS]
            seeds = sum(not study.is_done(stage) for stage in runs)
        num_runs += untuned + seeds
        hours = num_runs * seconds / jobs / 3600
        names = ", ".join(arm.name for arm in pair)
        lines.append(f"{names}: {untuned} runs to tune, {seeds} of the seeds; done {hours:.2f} hours from now")
    lines.append(f"{num_runs} runs of {seconds:.0f} s, {jobs} at a time; {study.spent_hours(jobs):.2f} hours are spent")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits.ablation_buffer",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    names = [arm.name for arm in ARMS]
    parser.add_argument("--output", type=Path, default=Path("runs/digits-ablations"), help="folder (%(default)s)")
    parser.add_argument(
        "--budget-hours", type=float, default=4.0, help="of all calls together; 0: no end (%(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs side by side (%(default)s)")
    parser.add_argument("--arms", nargs="+", choices=names, default=names, metavar="ARM", help=f"of {', '.join(names)}")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run (%(default)s)")
    parser.add_argument("--plan", action="store_true", help="run nothing; say what is left to run and for how long")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings of every run")
    options = parser.parse_intermixed_args(arguments)
    study = Study(options.output, options.steps, tuple(options.settings))
    arms = [arm for arm in ARMS if arm.name in options.arms]
    console = Console()
    if options.plan:
        console.print(plan(study, arms, options.jobs), markup=False, highlight=False, soft_wrap=True)
        return
    runner = StageRunner(options.output, threads=options.jobs, console=console)
    try:
        run_study(study, runner, arms=arms, jobs=options.jobs, budget_hours=options.budget_hours)
    except StageError as error:
        console.print(f"error: {error}", markup=False, highlight=False, style="red", soft_wrap=True)
        raise SystemExit(1) from error
    except BudgetSpent as stop:
        console.print(str(stop), markup=False, highlight=False, soft_wrap=True)
    console.print(write_results(study, arms), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
