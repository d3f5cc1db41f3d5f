"""The report of a run: numbers, pictures and texts on one HTML page that needs nothing from anywhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import yaml

from megatron_r1v2.monitoring.metrics import SECTIONS, Chart
from megatron_r1v2.report.charts import draw
from megatron_r1v2.report.html import data_uri, template, write_page
from megatron_r1v2.report.read import Json, Run, mean_of, read_run

MAX_TEXT = 20_000


@dataclass(frozen=True)
class Measure:
    """A row of the evaluation table."""

    key: str
    title: str
    percent: bool = True
    better: int = 1
    """1: higher is better; -1: lower is better; 0: neither."""


MEASURES = (
    Measure("pass_at_1", "Pass@1"),
    Measure("format_rate", "Format right"),
    Measure("hallucination_rate", "Claims that the image contradicts", better=-1),
    Measure("claim_coverage", "Responses that make a claim"),
    Measure("mean_response_tokens", "Tokens a response", percent=False, better=0),
)

CONDITIONS = ("num_prompts", "temperature", "top_p", "seed")


def write_report(run_dir: Path | str) -> Path:
    """Write the report of a run, finished or still going.

    Returns:
        The path of report.html in that folder.

    Raises:
        ValueError: the folder does not exist.
    """
    run = read_run(run_dir)
    return write_page(run.path / "report.html", render(run))


def render(run: Run) -> str:
    """Return the page as HTML; all text from the run is escaped."""
    settings = _settings(run)
    return template("report.html").render(
        name=settings.get("run.name") or run.path.resolve().name,
        folder=run.path,
        last_step=max(run.metrics, default=None),
        num_steps=settings.get("train.steps"),
        cards=_cards(run),
        table=_table(run),
        groups=_groups(run, settings),
        pairs=[
            {"change": p.change, "before": shown_rollout(p.before), "after": shown_rollout(p.after)} for p in run.pairs
        ],
        changes=run.changes,
        rollouts={step: [shown_rollout(row) for row in rows] for step, rows in run.rollouts.items()},
        settings=run.settings,
        notes=run.notes,
    )


def _settings(run: Run) -> dict[str, object]:
    """Return the settings of the saved recipe by dotted name; an empty dictionary where it cannot be read."""
    try:
        loaded = yaml.safe_load(run.settings)
    except yaml.YAMLError:
        run.notes.append("recipe.yaml is not valid YAML; it is shown as it stands.")
        return {}
    sections = loaded.items() if isinstance(loaded, dict) else ()
    return {f"{s}.{key}": value for s, keys in sections if isinstance(keys, dict) for key, value in keys.items()}


def _groups(run: Run, settings: Mapping[str, object]) -> list[tuple[str, list[tuple[Chart, str]]]]:
    groups = []
    for section in SECTIONS:
        drawn = []
        for chart in section.charts:
            target = settings.get(chart.target)
            # A target of 0 is one that was not set.
            svg = draw(chart, run, target=float(target) if isinstance(target, (int, float)) and target else None)
            if svg is not None:
                drawn.append((chart, svg))
        if drawn:
            groups.append((section.title, drawn))
    return groups


def _cards(run: Run) -> list[tuple[str, str, str]]:
    """Return (title, value, remark) of the figures at the top."""
    cards = []
    by_name = {row["name"]: row for row in run.evaluations}
    before, after = by_name.get("before", {}), by_name.get("after", {})
    for key, title in (("pass_at_1", "Pass@1"), ("hallucination_rate", "Hallucination")):
        first, second, coverage = before.get(key), after.get(key), after.get("claim_coverage")
        if _finite(first) and _finite(second):
            remark = "before and after"
            if key == "hallucination_rate" and _finite(coverage):
                remark = f"of claims; {_percent(coverage)} of responses make one"
            cards.append((title, f"{_percent(first)} \N{RIGHTWARDS ARROW} {_percent(second)}", remark))
    third = max(1, len(run.metrics) // 3)
    last = slice(-third, None)
    reward = mean_of(run.metrics, "critic/rewards/mean", last)
    if reward is not None:
        start = mean_of(run.metrics, "critic/rewards/mean", slice(0, third))
        cards.append(("Reward", f"{start:.2f} \N{RIGHTWARDS ARROW} {reward:.2f}", "first and last third of the steps"))
    trained = mean_of(run.metrics, "ssb/trained_effective_fraction", last)
    fresh = mean_of(run.metrics, "ssb/fresh_effective_fraction", last)
    if trained is not None and fresh is not None:
        cards.append(("Effective, trained on", _percent(trained), f"{_percent(fresh)} of the fresh; last third"))
    seconds = mean_of(run.metrics, "timing_s/step", slice(None))
    if seconds is not None:
        cards.append(("A step takes", f"{seconds:.3g} s", "mean over all steps"))
    return cards


def _table(run: Run) -> dict[str, object] | None:
    """Return the evaluation table: a column for each, and the change where there is a before and an after."""
    if not run.evaluations:
        return None
    by_name = {row["name"]: row for row in run.evaluations}
    compared = [by_name.get("before"), by_name.get("after")]
    rows = []
    for measure in MEASURES:
        if any(_finite(row.get(measure.key)) for row in run.evaluations):
            cells = [_cell(row, measure) for row in run.evaluations]
            rows.append({"title": measure.title, "cells": cells, "change": _change(compared, measure)})
    names = [*CONDITIONS, "runs"]
    conditions = [{key: _condition(row, key) for key in names} for row in run.evaluations]
    differing = [key for key in names if all(compared) and _differs(compared, key)]
    return {
        "names": [row["name"] for row in run.evaluations],
        "steps": [row.get("step") for row in run.evaluations],
        "rows": rows,
        "conditions": conditions,
        "differing": differing,
        "compared": all(compared),
    }


def _cell(row: Json, measure: Measure) -> str:
    value = row.get(measure.key)
    if not _finite(value):
        return "-"
    text = _percent(value) if measure.percent else f"{value:.1f}"
    deviation = row.get("pass_at_1_std")
    if measure.key == "pass_at_1" and _finite(deviation):
        text += f" \N{PLUS-MINUS SIGN} {100 * deviation:.1f}"
    return text


def _change(compared: list[Json | None], measure: Measure) -> tuple[str, str]:
    """Return the difference of after and before as text, and whether it is "good", "bad" or neither ("")."""
    before, after = ((row or {}).get(measure.key) for row in compared)
    if not _finite(before) or not _finite(after):
        return "", ""
    difference = after - before
    text = f"{100 * difference:+.1f} points" if measure.percent else f"{difference:+.1f}"
    sign = (difference > 0) - (difference < 0)
    return text, {1: "good", -1: "bad", 0: ""}[sign * measure.better]


def _condition(row: Json, key: str) -> str:
    value = row.get(key)
    return str(len(value)) if isinstance(value, list) else "-" if value is None else str(value)


def _differs(compared: list[Json | None], key: str) -> bool:
    first, second = (_condition(row or {}, key) for row in compared)
    return first != second


def shown_rollout(row: Json) -> dict[str, object]:
    """Return the fields that the templates show of a line of rollouts.jsonl, whatever is missing from it."""
    text = str(row.get("text") or "")
    if len(text) > MAX_TEXT:
        omitted = len(text) - MAX_TEXT
        text = f"{text[: MAX_TEXT // 2]}\n[... {omitted} characters left out ...]\n{text[-MAX_TEXT // 2 :]}"
    reasoning, end, answer = text.rpartition("</think>")
    rewards = row.get("rewards")
    claims = row.get("claims")
    return {
        "key": row.get("prompt_key", ""),
        "question": row.get("question") or "",
        "expected": row.get("answer", ""),
        "reasoning": reasoning + end,
        "answer": answer,
        "correct": bool(row.get("correct")),
        "rewards": {k: v for k, v in rewards.items() if _finite(v)} if isinstance(rewards, dict) else {},
        "total": row.get("total") if _finite(row.get("total")) else None,
        "model_score": row.get("model_score") if _finite(row.get("model_score")) else None,
        "advantage": row.get("advantage") if _finite(row.get("advantage")) else None,
        "claims": [c for c in claims if isinstance(c, list) and len(c) == 3] if isinstance(claims, list) else [],
        "finish": row.get("finish_reason") or "",
        "tokens": row.get("response_tokens"),
        "image": data_uri(row.get("image_png")),
    }


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
