"""The comparison of runs: their curves in the same pictures, and the settings in which they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_r1v2.monitoring.metric import Chart
from megatron_r1v2.monitoring.metrics import SECTIONS
from megatron_r1v2.report.charts import draw_overlay, run_color, target_of
from megatron_r1v2.report.html import template, write_page
from megatron_r1v2.report.page import CONDITIONS, condition_text, measure_cell, measures_of, run_facts
from megatron_r1v2.report.read import Json, Run, read_run

PAGE = "comparison.html"
FACTS = ("stage", "model", "began", "version", "hardware")
_ABSENT = "-"
# They name a run: every run differs in them.
_NAMES = {"run.output_dir", "run.name"}


@dataclass(frozen=True)
class Picture:
    """One metric of several runs."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class DifferingSetting:
    """A setting with other values in other runs."""

    name: str
    values: Sequence[str]
    """Of each run."""


def write_comparison(folders: Sequence[Path | str], output: Path | None = None) -> Path:
    """Write the comparison of runs, finished or still going.

    Args:
        output: the page; None: `comparison.html` in the first folder.

    Returns:
        The path of the page.

    Raises:
        ValueError: a folder does not exist, or is given twice.
    """
    seen: set[Path] = set()
    for folder in map(Path, folders):
        if folder.resolve() in seen:
            raise ValueError(f"run folder {str(folder)!r} is given twice; give each run once")
        seen.add(folder.resolve())
    runs = [read_run(folder) for folder in folders]
    return write_page(output if output is not None else Path(folders[0]) / PAGE, render_comparison(runs))


def render_comparison(runs: Sequence[Run]) -> str:
    """Return the page as HTML; all text from the runs is escaped."""
    names = run_names(runs)
    return template("comparison.html").render(
        runs=[_mark(name, number) for number, name in enumerate(names)],
        rows=_summary(runs),
        settings=differing_settings(runs),
        groups=_groups(runs),
        has_targets=any(target_of(chart, run) for section in SECTIONS for chart in section.charts for run in runs),
        notes=[f"{name}: {note}" for run, name in zip(runs, names, strict=True) for note in run.notes],
        changes=[
            (name, step, changed)
            for run, name in zip(runs, names, strict=True)
            for step, changed in run.changes.items()
        ],
    )


def run_names(runs: Sequence[Run]) -> list[str]:
    """Return a name for each run; runs of one name have their folders instead."""
    times = Counter(run.name for run in runs)
    return [run.name if times[run.name] == 1 else str(run.path) for run in runs]


def differing_settings(runs: Sequence[Run]) -> list[DifferingSetting]:
    """Return the settings in which the recipes of runs differ, by name; a run without a recipe differs in none."""
    with_recipe = [run.recipe for run in runs if run.recipe]
    names = sorted({name for recipe in with_recipe for name in recipe} - _NAMES)
    return [
        DifferingSetting(name, [_value(run.recipe, name) for run in runs])
        for name in names
        if len({_value(recipe, name) for recipe in with_recipe}) > 1
    ]


def _value(recipe: Mapping[str, object], name: str) -> str:
    return str(recipe[name]) if name in recipe else _ABSENT


def _mark(name: str, number: int) -> dict[str, str]:
    """Return the name of a run and the look of its curves."""
    color, style = run_color(number)
    return {"name": name, "color": color, "border": {"-": "solid", "--": "dashed", ":": "dotted"}[style]}


def _summary(runs: Sequence[Run]) -> list[dict[str, object]]:
    """Return the rows of the table of runs, each with a cell for every run."""
    facts = [run_facts(run) for run in runs]
    last = [run.evaluations[-1] if run.evaluations else {} for run in runs]
    words: list[tuple[str, Sequence[object]]] = [
        ("folder", [run.path for run in runs]),
        *((name, [of_run.get(name, _ABSENT) for of_run in facts]) for name in FACTS),
        ("steps", [_steps(run) for run in runs]),
        ("last evaluation", [row.get("name", _ABSENT) for row in last]),
        ("evaluated on", [condition_text(row, "data") for row in last]),
        ("evaluated with", [_conditions(row) for row in last]),
    ]
    rows: list[dict[str, object]] = [{"title": title, "cells": cells, "kind": "text-cell"} for title, cells in words]
    for measure in measures_of(last):
        cells = [measure_cell(row, measure) for row in last]
        rows.append({"title": measure.title, "cells": cells, "kind": "figure-cell"})
    return rows


def _conditions(evaluation: Json) -> str:
    """Return the prompts and the sampling of an evaluation: figures of others are not to be compared."""
    if not evaluation:
        return _ABSENT
    values = [f"{name.replace('_', ' ')} {condition_text(evaluation, name)}" for name in CONDITIONS]
    return ", ".join(values)


def _steps(run: Run) -> str:
    done, whole = max(run.metrics, default=0), run.recipe.get("train.steps")
    return f"{done} of {whole}" if whole else str(done)


def _groups(runs: Sequence[Run]) -> list[dict[str, object]]:
    groups: list[dict[str, object]] = []
    for section in SECTIONS:
        pictures = [picture for chart in section.charts for picture in _pictures(chart, runs)]
        if pictures:
            groups.append({"title": section.title, "pictures": pictures})
    return groups


def _pictures(chart: Chart, runs: Sequence[Run]) -> list[Picture]:
    drawn = draw_overlay(chart, runs)
    if len(drawn) == 1:
        return [Picture(chart.title, chart.caption, svg) for _, svg in drawn]
    return [Picture(f"{chart.title}: {label}", chart.caption, svg) for label, svg in drawn]
