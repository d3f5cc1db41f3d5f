"""The common part of the examples that run the whole path: paths, stages, command line, tables."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.stages import Stage, StageError, StageRunner

BUFFER_METRICS = {
    "ssb/fresh_effective_fraction": "effective, fresh (of all generated)",
    "ssb/trained_effective_fraction": "effective, trained on (with SSB)",
    "ssb/distinct_samples": "distinct samples in a batch",
    "ssb/distinct_prompts": "distinct prompts in a batch",
    "ssb/reuse_mean": "times a sample was used",
    "ssb/age_mean": "age of replayed samples, steps",
    "ssb/clip_fraction_replayed": "replayed tokens clipped",
    "ssb/gradient_share_replayed": "gradient share of the replayed",
}


class Paths:
    """The paths of one example.

    Args:
        root: folder for all of it.
        recipes: folder with align.yaml, grpo.yaml and the others.
    """

    def __init__(self, root: Path, recipes: Path) -> None:
        self.root, self.recipes = root, recipes
        self.data = root / "data"
        self.shards = root / "shards"
        self.vision = root / "components" / "vision"
        self.language = root / "components" / "language"
        self.adapter = root / "components" / "adapter"
        self.base = root / "base"
        self.align = root / "align"
        self.pairs = root / "pairs"
        self.mpo = root / "mpo"
        self.grpo = root / "grpo"
        self.export = root / "export"


def shard_stages(paths: Paths, names: Sequence[str]) -> list[Stage]:
    """Return the stages that turn each set of questions into shards."""
    return [
        Stage(
            f"shards-{name}",
            f"write the {name} shards",
            (
                "megatron_r1v2",
                "prepare",
                str(paths.data / f"{name}.jsonl"),
                *("--images", str(paths.data / "images"), "--output", str(paths.shards / name)),
            ),
        )
        for name in names
    ]


def base_stage(paths: Paths, *, adapter: Path | None = None) -> Stage:
    """Return the stage that splices the components; without an adapter it is random."""
    parts = ["--vision", str(paths.vision), "--language", str(paths.language)]
    if adapter is not None:
        parts += ["--adapter", str(adapter)]
    return Stage(
        "base",
        f"splice tower, {'fitted' if adapter else 'random'} adapter and language model",
        ("checkpoint_tools.reassemble", *parts, "--output", str(paths.base)),
    )


def align_stage(paths: Paths, seed: int, overrides: Sequence[str], *, what: str) -> Stage:
    """Return the supervised stage; `what` says how long it goes on."""
    settings = (
        f"run.output_dir={paths.align}",
        f"run.seed={seed}",
        f"model.hf_path={paths.base}",
        f"data.train={paths.shards / 'align'}",
    )
    command = ("megatron_r1v2", "align", str(paths.recipes / "align.yaml"), *settings, *overrides)
    return Stage("align", what, command)


def grpo_settings(paths: Paths, seed: int, checkpoint: Path, overrides: Sequence[str]) -> tuple[str, ...]:
    """Return the recipe and settings that GRPO and all evaluations share, with the weights to start from."""
    return (
        str(paths.recipes / "grpo.yaml"),
        f"run.output_dir={paths.grpo}",
        f"run.seed={seed}",
        f"model.hf_path={paths.base}",
        f"model.checkpoint={checkpoint}",
        f"data.train={paths.shards / 'grpo'}",
        *overrides,
    )


def evaluation_stage(paths: Paths, seed: int, name: str, checkpoint: Path, overrides: Sequence[str]) -> Stage:
    """Return the evaluation of a checkpoint on what was held out."""
    recipe, *settings = grpo_settings(paths, seed, checkpoint, overrides)
    heldout = f"evaluation.data={paths.shards / 'heldout'}"
    command = ("megatron_r1v2", "evaluate", recipe, "--name", name, heldout, *settings)
    return Stage(f"evaluate-{name}", f"Pass@1 on what was held out: {name}", command)


def grpo_stage(paths: Paths, seed: int, checkpoint: Path, overrides: Sequence[str]) -> Stage:
    """Return the reinforcement learning stage, which starts from a checkpoint."""
    command = ("megatron_r1v2", "grpo", *grpo_settings(paths, seed, checkpoint, overrides))
    # Two data-parallel ranks keep two cores busier than two threads do.
    return Stage("grpo", "GRPO with the Selective Sample Buffer", command, processes=2)


def closing_stages(paths: Paths) -> list[Stage]:
    """Return what is made of the trained model: the HF export and the report."""
    source = ("--checkpoint", str(paths.grpo), "--base", str(paths.base))
    export = ("checkpoint_tools.megatron_to_hf", *source, "--output", str(paths.export))
    return [
        Stage("export", "write the trained model as an HF folder", export),
        Stage("report", "write the report", ("megatron_r1v2", "report", str(paths.grpo))),
    ]


def buffer_table(metrics: Path) -> Table:
    """Return what the Selective Sample Buffer did, over the first and the last third of the steps."""
    with metrics.open(encoding="utf-8") as file:
        steps = [json.loads(line) for line in file]
    third = max(1, len(steps) // 3)
    table = Table(title="Selective Sample Buffer")
    table.add_column("mean over the steps")
    table.add_column("first third", justify="right")
    table.add_column("last third", justify="right")
    for name, label in BUFFER_METRICS.items():
        cells = []
        for part in (steps[:third], steps[-third:]):
            values = [step[name] for step in part if step.get(name) is not None]
            cells.append(f"{statistics.fmean(values):.3g}" if values else "-")
        table.add_row(label, *cells)
    return table


def run_example(
    arguments: list[str] | None,
    *,
    module: str,
    description: str | None,
    paths_of: Callable[[Path], Paths],
    output: str,
    run: Callable[[Paths, StageRunner, int, Sequence[str]], None],
    show: Callable[[Paths, Console], None],
) -> None:
    """Run the command line of an example: its stages, its results, and where things are.

    Args:
        arguments: of the command line; None: the process's.
        module: after `python -m`.
        description: above the options.
        paths_of: from the folder for everything.
        output: the folder by default.
        run: runs the stages; gets the seed and settings of grpo.yaml to change.
        show: prints the results.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(output),
        help="folder for everything (%(default)s);\nstages that it holds already are not run again",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of all that is drawn at random (%(default)s)")
    parser.add_argument(
        "--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads to use (%(default)s)"
    )
    parser.add_argument(
        "settings", nargs="*", metavar="section.key=value", help="settings of grpo.yaml to change, e.g. train.steps=20"
    )
    options = parser.parse_args(arguments)
    console, paths, start = Console(), paths_of(options.output), time.perf_counter()
    runner = StageRunner(options.output, threads=options.threads, console=console)
    try:
        run(paths, runner, options.seed, options.settings)
    except StageError as error:
        console.print(f"error: {error}", markup=False, highlight=False, style="red", soft_wrap=True)
        raise SystemExit(1) from error
    show(paths, console)
    longest = sorted(runner.seconds.items(), key=lambda item: -item[1])[:4]
    slowest = ", ".join(f"{name} {seconds:.0f}" for name, seconds in longest)
    wall = time.perf_counter() - start
    console.print(f"time      {wall:.0f} s (slowest stages: {slowest})", soft_wrap=True, highlight=False)
    console.print(f"HF export {paths.export}", soft_wrap=True)
    console.print(f"report    {paths.grpo / 'report.html'}", soft_wrap=True)
