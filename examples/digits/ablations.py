"""The paper's ablations in miniature: many runs on handwritten digits, some tables (`make demo` runs none of this).

    rollouts    table 2: GRPO without the buffer, with it, with DAPO's dynamic sampling, and with shuffled rewards
    stages      table 3: SFT, DPO and MPO on the model's own pairs, and GRPO after MPO
    threshold   the paper's paragraph on tau: MPO on pairs whose margin is at least so much
    parts       table 4: which parts of the model GRPO trains

Every run starts from the same components; data order, sampling and the aligned adapter differ by seed. Finished runs
are not run again, so a run that was interrupted goes on where it stopped. When the buffer pays at all is a study of its
own: ablation_buffer.py.

python -m examples.digits.ablations --output runs/digits-ablations --seeds 3
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from examples.digits import ablation_tables
from examples.stages import Stage, StageError, StageRunner, read_steps

RECIPES = Path(__file__).parent
FIRST_SEED = 1234
STEPS = 50
"""GRPO steps of an arm."""
DYNAMIC_ROUNDS = 4
VALIDATE_EVERY = 10
THRESHOLDS = (0.5, 1.0, 1.5)
"""tau, in the reward of pairs.yaml: a wrong answer costs 1, a contradicted claim and a missing step 0.5 each."""
START = "align"
"""The folder of a seed's aligned model."""


@dataclass(frozen=True)
class Arm:
    """One way of training, a row of the tables.

    Example: Arm("ssb", "GRPO with SSB", ("rollouts", "parts")).
    """

    name: str
    label: str
    """Its row in the tables."""
    tables: tuple[str, ...]
    settings: tuple[str, ...] = ()
    """Settings of its stage."""
    stage: Literal["grpo", "mpo"] = "grpo"
    start: str = "mpo"
    """The arm from whose end it starts, or START for the aligned model."""


MPO = "preference.preference_weight=0.8", "preference.quality_weight=0.2", "preference.generation_weight=1"
DPO = "preference.preference_weight=1", "preference.quality_weight=0", "preference.generation_weight=0"
SFT = "preference.preference_weight=0", "preference.quality_weight=0", "preference.generation_weight=1"

ARMS = (
    Arm("mpo", "MPO", ("rollouts", "stages", "threshold", "parts"), MPO, "mpo", START),
    Arm("ssb", "MPO, then GRPO with SSB (adapter only)", ("rollouts", "stages", "parts")),
    Arm("plain", "GRPO without SSB", ("rollouts",), ("buffer.capacity=0",)),
    Arm(
        "dynamic",
        "GRPO with dynamic sampling (DAPO)",
        ("rollouts",),
        (
            "buffer.capacity=0",
            f"algorithm.dynamic_sampling_rounds={DYNAMIC_ROUNDS}",
            # A step generates up to as much as that many steps of the others.
            f"train.steps={STEPS * 2 // 5}",
            "evaluation.every_steps=4",
        ),
    ),
    Arm("shuffled", "control: SSB, shuffled rewards", ("rollouts",), ("reward.shuffle=true",)),
    Arm("sft", "SFT on the chosen responses", ("stages",), SFT, "mpo", START),
    Arm("dpo", "DPO", ("stages",), DPO, "mpo", START),
    *(
        Arm(
            f"tau-{tau:g}",
            f"MPO, margin at least {tau:g}",
            ("threshold",),
            (*MPO, f"preference.min_margin={tau}"),
            "mpo",
            START,
        )
        for tau in THRESHOLDS
    ),
    Arm("language", "adapter and language model", ("parts",), ("train.parts=[adapter, language]",)),
    Arm("vision", "adapter and vision tower", ("parts",), ("train.parts=[adapter, vision]",)),
    Arm("all", "adapter, language model and vision tower", ("parts",), ("train.parts=[adapter, language, vision]",)),
)
FIRST_ARM = ARMS[0]


def seed_folder(root: Path, seed: int) -> Path:
    """Return the folder of the runs of a seed."""
    return root / f"seed-{seed}"


def shared_steps(root: Path) -> list[Stage]:
    """Return the demo's steps up to the base model, which all arms share, in a folder of their own."""
    steps = read_steps(RECIPES / "run.sh")
    names = [step.name for step in steps]
    return [
        Stage(step.name, tuple(argument.replace("runs/digits", str(root)) for argument in step.command))
        for step in steps[: names.index("base") + 1]
    ]


def arm_stage(root: Path, seed: int, arm: str, command: str, output: Path, settings: Sequence[str]) -> Stage:
    """Return a stage of the demo with the seed, the shared base model and the output of an arm.

    Args:
        command: align, pairs, mpo or grpo, whose recipe it is.
        settings: of the recipe, changed.
    """
    given = (f"run.output_dir={output}", f"run.seed={seed}", f"model.hf_path={root / 'base'}", *settings)
    return Stage(f"seed-{seed}-{arm}-{command}", ("r1v2", command, str(RECIPES / f"{command}.yaml"), *given))


def evaluation_stage(root: Path, seed: int, arm: str) -> Stage:
    """Return the evaluation of an arm on what was held out."""
    run = seed_folder(root, seed) / arm
    settings = (f"model.checkpoint={run}", f"evaluation.data={root / 'shards' / 'heldout'}")
    _, _, recipe, *given = arm_stage(root, seed, arm, "grpo", run, settings).command
    return Stage(f"seed-{seed}-{arm}-evaluate", ("r1v2", "evaluate", recipe, "--name", "heldout", *given))


def start_chain(root: Path, seed: int) -> list[Stage]:
    """Return the stages before the arms of a seed: the aligned model, pairs of its responses, and MPO on them."""
    folder, shards = seed_folder(root, seed), root / "shards"
    align = (f"data.train={shards / 'align'}", f"data.validation={shards / 'validation'}")
    pairs = (f"data.train={shards / 'prefer'}", f"model.checkpoint={folder / START}")
    return [
        arm_stage(root, seed, START, "align", folder / START, align),
        evaluation_stage(root, seed, START),
        arm_stage(root, seed, START, "pairs", folder / "pairs", pairs),
        *arm_chain(root, seed, FIRST_ARM, ()),
    ]


def arm_chain(root: Path, seed: int, arm: Arm, overrides: Sequence[str]) -> list[Stage]:
    """Return the training of an arm and its evaluation."""
    folder, shards = seed_folder(root, seed), root / "shards"
    start = f"model.checkpoint={folder / arm.start}"
    settings: tuple[str, ...] = (start, f"data.train={folder / 'pairs'}", *arm.settings)
    if arm.stage == "grpo":
        settings = (
            start,
            f"data.train={shards / 'grpo'}",
            f"train.steps={STEPS}",
            "checkpoint.every_steps=0",
            f"data.validation={shards / 'validation'}",
            f"evaluation.every_steps={VALIDATE_EVERY}",
            "evaluation.runs=1",
            *arm.settings,
            *overrides,
        )
    stage = arm_stage(root, seed, arm.name, arm.stage, folder / arm.name, settings)
    return [stage, evaluation_stage(root, seed, arm.name)]


def chains(root: Path, seed: int, tables: Collection[str], overrides: Sequence[str]) -> list[list[Stage]]:
    """Return the chains of a seed that some tables need; all start from what `start_chain` makes."""
    wanted = [arm for arm in ARMS if arm is not FIRST_ARM and set(arm.tables) & set(tables)]
    return [arm_chain(root, seed, arm, overrides) for arm in wanted]


def run_ablations(
    root: Path, runner: StageRunner, *, seeds: Sequence[int], tables: Sequence[str], overrides: Sequence[str], jobs: int
) -> None:
    """Run everything that the tables need.

    Args:
        root: folder of everything.
        runner: runs and remembers the stages.
        seeds: of the arms.
        tables: keys of `ablation_tables.TABLES`.
        overrides: settings of every GRPO stage.
        jobs: runs at the same time.

    Raises:
        StageError: a stage failed; finished stages stay finished.
    """
    for step in shared_steps(root):
        runner.run(step)
    runner.run_chains([start_chain(root, seed) for seed in seeds], at_once=jobs)
    # Seed by seed: an interrupted run has whole rows for some seeds rather than parts of all.
    every = [chain for seed in seeds for chain in chains(root, seed, tables, overrides)]
    runner.run_chains(every, at_once=jobs)


def arm_folders(root: Path, seeds: Sequence[int], table: str) -> Mapping[str, list[Path]]:
    """Return the folders of the finished runs of each row of a table, by label."""
    rows = {"before: aligned adapter": [seed_folder(root, seed) / START for seed in seeds]}
    rows |= {arm.label: [seed_folder(root, seed) / arm.name for seed in seeds] for arm in ARMS if table in arm.tables}
    return {
        label: [folder for folder in folders if (folder / "evaluation-heldout.json").is_file()]
        for label, folders in rows.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits.ablations", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/digits-ablations"), help="folder (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (%(default)s)")
    parser.add_argument(
        "--tables",
        nargs="+",
        choices=ablation_tables.TABLES,
        default=list(ablation_tables.TABLES),
        help="which (all)",
    )
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs side by side (%(default)s)")
    parser.add_argument("--only-tables", action="store_true", help="run nothing, write tables of the finished runs")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings of every GRPO stage")
    options = parser.parse_intermixed_args(arguments)
    console, start = Console(), time.perf_counter()
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    if not options.only_tables:
        runner = StageRunner(options.output, threads=options.jobs, console=console)
        try:
            run_ablations(
                options.output,
                runner,
                seeds=seeds,
                tables=options.tables,
                overrides=options.settings,
                jobs=options.jobs,
            )
        except StageError as error:
            console.print(f"error: {error}", markup=False, highlight=False, style="red", soft_wrap=True)
            raise SystemExit(1) from error
        console.print(f"all runs done ({time.perf_counter() - start:.0f} s)", highlight=False)
    for table in options.tables:
        text = ablation_tables.write_table(
            options.output, table, arm_folders(options.output, seeds, table), seeds=len(seeds)
        )
        console.print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
