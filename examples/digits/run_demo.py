"""The paper in miniature, every stage on real handwriting, on a CPU in minutes: this is `make demo`.

data         pictures of two handwritten digits and questions about them, split by handwriting
components   a vision tower pretrained on digits and a language model pretrained on text, as HF folders
base         both spliced, with a random adapter between them
align        the adapter learns from reference responses until a little under half of its answers are right
prefer       pairs of a better and a worse response, from the aligned model's own responses
mpo          the adapter learns from these pairs
grpo         the adapter learns from rewards alone, with the Selective Sample Buffer
evaluation   Pass@1 on handwriting that no stage has trained on, after each of the last stages, with equal seeds
export       the trained model as an HF folder that plain transformers loads
report       one HTML page about the GRPO run

python -m examples.digits.run_demo --output runs/digits
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.digits.stages import Stage, StageError, StageRunner
from megatron_r1v2.evaluation.pass_at_1 import comparison_table, read_evaluation

RECIPES = Path(__file__).parent
IMAGE_SETS = ("align", "prefer", "grpo", "validation", "heldout")
BASE_RANGE = (0.35, 0.60)
"""Where the base model's Pass@1 should be: below, GRPO sees too few right answers; above, too few wrong ones."""
GOAL = 0.85
EVALUATIONS = ("aligned", "mpo", "grpo")
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
    """Where everything of one demo is."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = root / "data"
        self.shards = root / "shards"
        self.vision = root / "components" / "vision"
        self.language = root / "components" / "language"
        self.base = root / "base"
        self.align = root / "align"
        self.pairs = root / "pairs"
        self.mpo = root / "mpo"
        self.grpo = root / "grpo"
        self.export = root / "export"


def component_stages(paths: Paths, seed: int) -> list[Stage]:
    """Return the stages that need nothing but scikit-learn's digits; they may run side by side."""
    return [
        Stage(
            "language-model",
            "pretrain a Qwen2 on text reasoning",
            ("examples.digits.make_language_model", "--output", str(paths.language), "--seed", str(seed)),
        ),
        Stage(
            "vision-tower",
            "pretrain an InternViT on single digits",
            ("examples.digits.make_vision_tower", "--output", str(paths.vision), "--seed", str(seed)),
        ),
    ]


def data_stage(paths: Paths, seed: int) -> Stage:
    """Return the stage that makes the questions."""
    command = ("examples.digits.make_data", "--output", str(paths.data), "--seed", str(seed))
    return Stage("data", "make questions about two digits", command)


def shard_stages(paths: Paths) -> list[Stage]:
    """Return the stages that turn each set of questions into shards."""
    return [
        Stage(
            f"shards-{name}",
            f"write the {name} shards",
            (
                "megatron_r1v2.data.prepare",
                str(paths.data / f"{name}.jsonl"),
                *("--images", str(paths.data / "images"), "--output", str(paths.shards / name)),
            ),
        )
        for name in IMAGE_SETS
    ]


def base_stage(paths: Paths) -> Stage:
    """Return the stage that splices the components."""
    parts = ("--vision", str(paths.vision), "--language", str(paths.language))
    return Stage(
        "base",
        "splice tower, random adapter and language model",
        ("checkpoint_tools.reassemble", *parts, "--output", str(paths.base)),
    )


def align_stage(paths: Paths, seed: int, overrides: Sequence[str]) -> Stage:
    """Return the supervised stage."""
    settings = (
        f"run.output_dir={paths.align}",
        f"run.seed={seed}",
        f"model.hf_path={paths.base}",
        f"data.train={paths.shards / 'align'}",
        f"data.validation={paths.shards / 'validation'}",
    )
    command = ("megatron_r1v2.align", str(RECIPES / "align.yaml"), *settings, *overrides)
    return Stage("align", "train the adapter until about half is right", command)


def prefer_stage(paths: Paths, seed: int) -> Stage:
    """Return the stage that makes preference pairs of the aligned model's own responses."""
    settings = (
        f"run.seed={seed}",
        f"model.hf_path={paths.base}",
        f"model.checkpoint={paths.align}",
        f"data.train={paths.shards / 'prefer'}",
        f"pairs.output={paths.pairs}",
    )
    command = ("megatron_r1v2.prefer", str(RECIPES / "prefer.yaml"), *settings)
    return Stage("prefer", "make preference pairs of the model's own responses", command)


def mpo_stage(paths: Paths, seed: int, overrides: Sequence[str]) -> Stage:
    """Return the preference optimization stage."""
    settings = (
        f"run.output_dir={paths.mpo}",
        f"run.seed={seed}",
        f"model.hf_path={paths.base}",
        f"model.checkpoint={paths.align}",
        f"data.train={paths.pairs}",
    )
    command = ("megatron_r1v2.mpo", str(RECIPES / "mpo.yaml"), *settings, *overrides)
    return Stage("mpo", "mixed preference optimization", command)


def grpo_settings(paths: Paths, seed: int, checkpoint: Path, overrides: Sequence[str]) -> tuple[str, ...]:
    """Return the recipe and settings that GRPO and both evaluations share, with the weights to start from."""
    return (
        str(RECIPES / "grpo.yaml"),
        f"run.output_dir={paths.grpo}",
        f"run.seed={seed}",
        f"model.hf_path={paths.base}",
        f"model.checkpoint={checkpoint}",
        f"data.train={paths.shards / 'grpo'}",
        f"evaluation.data={paths.shards / 'heldout'}",
        *overrides,
    )


def evaluation_stage(paths: Paths, seed: int, name: str, checkpoint: Path, overrides: Sequence[str]) -> Stage:
    """Return the evaluation of a checkpoint on held-out handwriting."""
    recipe, *settings = grpo_settings(paths, seed, checkpoint, overrides)
    command = ("megatron_r1v2.evaluate", recipe, "--name", name, *settings)
    return Stage(f"evaluate-{name}", f"Pass@1 on held-out handwriting: {name}", command)


def grpo_stage(paths: Paths, seed: int, checkpoint: Path, overrides: Sequence[str]) -> Stage:
    """Return the reinforcement learning stage, which starts from a checkpoint."""
    command = ("megatron_r1v2.grpo", *grpo_settings(paths, seed, checkpoint, overrides))
    # Two data-parallel ranks keep two cores busier than two threads do.
    return Stage("grpo", "GRPO with the Selective Sample Buffer", command, processes=2)


def closing_stages(paths: Paths) -> list[Stage]:
    """Return what is made of the trained model: the HF export and the report."""
    source = ("--checkpoint", str(paths.grpo), "--base", str(paths.base))
    export = ("checkpoint_tools.megatron_to_hf", *source, "--output", str(paths.export))
    return [
        Stage("export", "write the trained model as an HF folder", export),
        Stage("report", "write the report", ("megatron_r1v2.report", str(paths.grpo))),
    ]


def run_demo(paths: Paths, runner: StageRunner, *, seed: int, overrides: Sequence[str]) -> None:
    """Run every stage in order; each starts from what the ones before wrote.

    Raises:
        StageError: a stage failed.
    """
    runner.run(data_stage(paths, seed))
    runner.run(*component_stages(paths, seed))
    runner.run_chains([[stage] for stage in shard_stages(paths)], at_once=2)
    runner.run(base_stage(paths))
    runner.run(align_stage(paths, seed, ()))
    runner.run(evaluation_stage(paths, seed, "aligned", paths.align, overrides), prefer_stage(paths, seed))
    runner.run(mpo_stage(paths, seed, ()))
    runner.run(evaluation_stage(paths, seed, "mpo", paths.mpo, overrides))
    runner.run(grpo_stage(paths, seed, paths.mpo, overrides))
    runner.run(evaluation_stage(paths, seed, "grpo", paths.grpo, overrides))
    runner.run(*closing_stages(paths))


def show_results(paths: Paths, console: Console) -> None:
    """Print the table before and after, the buffer's numbers, and what is not as it should be."""
    results = [read_evaluation(paths.grpo / f"evaluation-{name}.json") for name in EVALUATIONS]
    console.print(comparison_table(results))
    console.print(buffer_table(paths.grpo / "metrics.jsonl"))
    for line in remarks(results[0].pass_at_1, results[-1].pass_at_1):
        console.print(line, highlight=False)


def remarks(before: float, after: float) -> list[str]:
    """Say what is not as the demo promises; empty when all is.

    Args:
        before: Pass@1 of the base model on held-out handwriting, 0 to 1.
        after: the same after GRPO.
    """
    low, high = BASE_RANGE
    lines = []
    if not low <= before <= high:
        lines.append(
            f"NOTE: the base model's Pass@1 is {before:.1%}, outside {low:.0%} to {high:.0%}: GRPO had an untypical "
            "start. evaluation.stop_at_pass_at_1 in align.yaml moves it."
        )
    if after < GOAL:
        lines.append(f"NOTE: Pass@1 after GRPO is {after:.1%}, below the {GOAL:.0%} that this demo should reach.")
    return lines


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


def show_end(paths: Paths, runner: StageRunner, console: Console, wall: float) -> None:
    """Print where things are and how long they took."""
    longest = sorted(runner.seconds.items(), key=lambda item: -item[1])[:4]
    slowest = ", ".join(f"{name} {seconds:.0f}" for name, seconds in longest)
    console.print(f"time      {wall:.0f} s (slowest stages: {slowest})", soft_wrap=True, highlight=False)
    console.print(f"HF export {paths.export}", soft_wrap=True)
    console.print(f"report    {paths.grpo / 'report.html'}", soft_wrap=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits.run_demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/digits"),
        help="folder for everything (%(default)s);\nstages that it holds already are not run again",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of data, components and training (%(default)s)")
    parser.add_argument(
        "--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads to use (%(default)s)"
    )
    parser.add_argument(
        "settings", nargs="*", metavar="section.key=value", help="settings of grpo.yaml to change, e.g. train.steps=20"
    )
    options = parser.parse_args(arguments)
    console, paths, start = Console(), Paths(options.output), time.perf_counter()
    runner = StageRunner(options.output, threads=options.threads, console=console)
    try:
        run_demo(paths, runner, seed=options.seed, overrides=options.settings)
    except StageError as error:
        console.print(f"error: {error}", markup=False, highlight=False, style="red", soft_wrap=True)
        raise SystemExit(1) from error
    show_results(paths, console)
    show_end(paths, runner, console, time.perf_counter() - start)


if __name__ == "__main__":
    main()
