"""The results of an example: the evaluations beside each other, the buffer's numbers, and where to look next.

python -m examples.results runs/digits
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_r1v2.evaluation.estimates import confidence_interval
from megatron_r1v2.evaluation.pass_at_1 import comparison_table
from megatron_r1v2.report.evaluation_read import Evaluation, read_evaluations

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
PLACES = {"report": "grpo/report.html", "answers": "grpo/evaluation.html", "picture": "demo.svg", "HF export": "export"}
"""The places that people look at, relative to the example's folder."""


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


def kind_table(evaluations: Sequence[Evaluation]) -> Table:
    """Return Pass@1 of each evaluation by kind of picture."""
    table = Table(title="Pass@1 by kind of picture")
    table.add_column("")
    for evaluation in evaluations:
        table.add_column(evaluation.result.name, justify="right")
    for kind in evaluations[0].groups["kind"]:
        table.add_row(kind, *(f"{each.groups['kind'][kind].rate:.1%}" for each in evaluations))
    return table


def gain_line(folder: Path, first: str, last: str) -> str:
    """Return the gain in Pass@1 between two evaluations of the same prompts, and whether it is more than chance."""
    before, after = (rates_by_prompt(folder / f"evaluation-{name}.rollouts.jsonl") for name in (first, last))
    gains = [after[key] - before[key] for key in before if key in after]
    mean = 100 * statistics.fmean(gains)
    low, high = (100 * end for end in confidence_interval(gains))
    words = "more than chance" if low > 0 else "less than nothing" if high < 0 else "no gain is shown: zero is in it"
    return (
        f"{last} against {first}: {mean:+.1f} points of Pass@1, 95 % interval {low:+.1f} to {high:+.1f} over "
        f"{len(gains)} prompts: {words}"
    )


def rates_by_prompt(rollouts: Path) -> dict[str, float]:
    """Return the part of the responses to each prompt that are right."""
    correct: dict[str, list[bool]] = {}
    for line in rollouts.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        correct.setdefault(row["prompt_key"], []).append(row["correct"])
    return {key: statistics.fmean(values) for key, values in correct.items()}


def remarks(before: float, after: float, *, start: tuple[float, float], goal: float) -> list[str]:
    """Return a sentence for each promise of an example that a run has not kept.

    Args:
        before: Pass@1 before the first training by rewards, 0 to 1.
        after: the same at the end.
        start: the range wanted at first: below, GRPO sees too few right answers; above, too few wrong ones.
        goal: wanted at the end.
    """
    low, high = start
    lines = []
    if not low <= before <= high:
        lines.append(
            f"NOTE: Pass@1 was {before:.1%} at first, outside {low:.0%} to {high:.0%}: GRPO had an untypical start. "
            "evaluation.stop_at_pass_at_1 in align.yaml moves it."
        )
    if after < goal:
        lines.append(f"NOTE: Pass@1 after GRPO is {after:.1%}, below the {goal:.0%} that this example should reach.")
    return lines


def time_line(records: Path) -> str:
    """Return the seconds of all steps and the slowest of them, from the records that the steps leave."""
    done = {path.stem: json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in records.glob("*.json")}
    slowest = sorted(done.items(), key=lambda item: -item[1])[:4]
    return f"{sum(done.values()):.0f} s in all steps (slowest: {', '.join(f'{n} {s:.0f}' for n, s in slowest)})"


def show_results(root: Path, console: Console, *, start: tuple[float, float], goal: float) -> None:
    """Print the tables of an example, what is not as promised, and where everything is."""
    check = root / "logs" / "check.log"
    if check.is_file():
        # The figures are at the end of the log, after the warnings of libraries.
        console.print("\n".join(check.read_text(encoding="utf-8").splitlines()[-4:]), highlight=False)
    evaluations = sorted(read_evaluations([root / "grpo"], []), key=lambda each: each.result.finished)
    results = [each.result for each in evaluations]
    console.print(comparison_table(results))
    for earlier, later in itertools.pairwise(results):
        console.print(gain_line(root / "grpo", earlier.name, later.name), soft_wrap=True, highlight=False)
    if "kind" in evaluations[0].groups:
        console.print(kind_table(evaluations))
    console.print(buffer_table(root / "grpo" / "metrics.jsonl"))
    for line in remarks(results[0].pass_at_1, results[-1].pass_at_1, start=start, goal=goal):
        console.print(line, highlight=False)
    console.print(f"{'time':<10} {time_line(root / 'stages')}", soft_wrap=True, highlight=False)
    for name, place in PLACES.items():
        if (root / place).exists():
            console.print(f"{name:<10} {root / place}", soft_wrap=True, highlight=False)
    console.print(
        f"try next   r1v2 serve {root / 'grpo'}   chat with the model; your own rows: docs/data.md; your own reward: "
        "examples/custom_reward",
        soft_wrap=True,
        highlight=False,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.results", description=__doc__)
    parser.add_argument("folder", type=Path, help="of an example that has run")
    parser.add_argument(
        "--start", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"), help="wanted Pass@1 before GRPO"
    )
    parser.add_argument("--goal", type=float, default=0.0, help="wanted Pass@1 after GRPO")
    options = parser.parse_args(arguments)
    show_results(options.folder, Console(), start=(options.start[0], options.start[1]), goal=options.goal)


if __name__ == "__main__":
    main()
