"""The tables of the runs of `ablations.py`: means and standard deviations over seeds, as Markdown and JSON."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_r1v2.evaluation.pass_at_1 import read_evaluation
from megatron_r1v2.resilience.files import write_file

TARGET = 0.82
"""The validation Pass@1 to which the arms of table "rollouts" are timed."""
LATE = 1 / 3
"""The last part of the steps, over which the columns named "late" are means."""

Row = dict[str, float | None]


def evaluation_row(run: Path) -> Row:
    """Return the columns that every table has: held-out Pass@1, hallucination rate and claim coverage."""
    result = read_evaluation(run / "evaluation-heldout.json")
    return {
        "Pass@1": result.pass_at_1,
        "hallucination": result.hallucination_rate,
        "coverage": result.claim_coverage,
    }


def read_steps(run: Path) -> list[dict[str, float]]:
    """Return the metrics of a run by step; empty where there was no training."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def read_rollout_steps(run: Path) -> list[dict[str, float]]:
    """Return the metrics of the steps with rollouts: all of GRPO, none of MPO."""
    return [step for step in read_steps(run) if "rollout/responses" in step]


def learning_curve(steps: Sequence[Mapping[str, float]], counted: str) -> list[tuple[float, float]]:
    """Return (sum of `counted` so far, validation Pass@1) at each validation.

    Args:
        steps: metrics by step.
        counted: "rollout/responses" or "rollout/tokens".
    """
    curve, total = [], 0.0
    for step in steps:
        total += step[counted]
        if "validation/pass_at_1" in step:
            curve.append((total, step["validation/pass_at_1"]))
    return curve


def cost_to_reach(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Return the cost at which a learning curve first reaches a target, linear between its points; None if never."""
    before = None
    for cost, value in curve:
        if value >= target:
            if before is None or value == before[1]:
                return cost
            return before[0] + (cost - before[0]) * (target - before[1]) / (value - before[1])
        before = (cost, value)
    return None


def value_at(curve: Sequence[tuple[float, float]], cost: float) -> float | None:
    """Return a learning curve's value at a cost, linear between its points; None outside them."""
    for (left, low), (right, high) in itertools.pairwise(curve):
        if left <= cost <= right:
            return low + (high - low) * (cost - left) / (right - left)
    return None


def rollouts_row(run: Path) -> Row:
    """Return the columns of table "rollouts"; the last needs all runs and is filled in later."""
    steps = read_rollout_steps(run)
    if not steps:
        return evaluation_row(run)
    late = steps[-max(1, int(len(steps) * LATE)) :]
    return {
        **evaluation_row(run),
        "effective, generated, late": statistics.fmean(step["ssb/fresh_effective_fraction"] for step in late),
        "effective, trained on, late": statistics.fmean(step["ssb/trained_effective_fraction"] for step in late),
        f"responses to {TARGET:.0%}": cost_to_reach(learning_curve(steps, "rollout/responses"), TARGET),
        f"tokens to {TARGET:.0%}": cost_to_reach(learning_curve(steps, "rollout/tokens"), TARGET),
        "responses": sum(step["rollout/responses"] for step in steps),
        "tokens": sum(step["rollout/tokens"] for step in steps),
    }


def threshold_row(run: Path) -> Row:
    """Return the columns of table "threshold": with the part of the pairs that was trained on."""
    steps = read_steps(run)
    kept, below = (sum(step.get(f"mpo/pairs_{name}", 0) for step in steps) for name in ("kept", "below_margin"))
    return evaluation_row(run) | ({"pairs trained on": kept / (kept + below)} if kept + below else {})


TABLES: Mapping[str, Callable[[Path], Row]] = {
    "rollouts": rollouts_row,
    "stages": evaluation_row,
    "threshold": threshold_row,
    "parts": evaluation_row,
}
"""The function that makes a row of each table from a run."""
EQUAL_TOKENS = "validation Pass@1 at equal tokens"


def make_table(table: str, runs: Mapping[str, Sequence[Path]]) -> dict[str, list[Row]]:
    """Return one row for each run (seed) of each arm.

    Args:
        table: a key of `TABLES`.
        runs: folders of each arm, by its label.
    """
    rows = {label: [TABLES[table](run) for run in folders] for label, folders in runs.items()}
    if table == "rollouts":
        curves = {
            label: [learning_curve(read_rollout_steps(run), "rollout/tokens") for run in folders]
            for label, folders in runs.items()
        }
        ends = [curve[-1][0] for of_arm in curves.values() for curve in of_arm if curve]
        for label, of_arm in curves.items():
            for row, curve in zip(rows[label], of_arm, strict=True):
                if curve:
                    row[EQUAL_TOKENS] = value_at(curve, min(ends))
    return rows


def summary(values: Sequence[float | None]) -> tuple[float | None, float | None, int]:
    """Return mean, sample standard deviation (None below two values) and number of the values that are not None."""
    known = [value for value in values if value is not None]
    if not known:
        return None, None, 0
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known)


def cell(values: Sequence[float | None]) -> str:
    """Return "mean +- deviation", with the number of runs that have the value where not all do."""
    mean, deviation, count = summary(values)
    if mean is None:
        return "-" if not values else f"- (0 of {len(values)})"
    text = _number(mean) if deviation is None else f"{_number(mean)} +- {_number(deviation)}"
    return text if count == len(values) else f"{text} ({count} of {len(values)})"


def markdown(rows: Mapping[str, Sequence[Row]]) -> str:
    """Return a table in Markdown, one line an arm."""
    columns = list(dict.fromkeys(name for of_arm in rows.values() for row in of_arm for name in row))
    lines = [f"| | {' | '.join(columns)} | seeds |", f"| --- |{' --- |' * (len(columns) + 1)}"]
    for label, of_arm in rows.items():
        cells = [cell([row[name] for row in of_arm]) if of_arm and name in of_arm[0] else "" for name in columns]
        lines.append(f"| {label} | {' | '.join(cells)} | {len(of_arm)} |")
    return "\n".join(lines) + "\n"


def write_table(root: Path, table: str, runs: Mapping[str, Sequence[Path]], *, seeds: int) -> str:
    """Write `table-NAME.md` and `table-NAME.json` (every run's numbers), and return the former.

    Args:
        root: folder of both files.
        table: a key of `TABLES`.
        runs: finished runs of each arm, by its label.
        seeds: number of runs that an arm should have; missing ones are listed below the table.
    """
    rows = make_table(table, runs)
    text = f"{table}\n\n{markdown(rows)}"
    missing = [f"{label}: {len(folders)} of {seeds}" for label, folders in runs.items() if len(folders) < seeds]
    if missing:
        text += f"\nunfinished: {'; '.join(missing)}\n"
    content: Mapping[str, Any] = {"table": table, "rows": rows}
    for suffix, written in ((".md", text), (".json", json.dumps(content, indent=1) + "\n")):
        write_file(root / f"table-{table}{suffix}", written)
    return text


def _number(value: float) -> str:
    if abs(value) <= 1.5:
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}"
