"""The report of a run: numbers, pictures and texts on one HTML page that needs nothing from anywhere else."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from megatron_r1v2.evaluation.pass_at_1 import size_text
from megatron_r1v2.monitoring.metrics import SECTIONS
from megatron_r1v2.report.charts import draw, is_zero
from megatron_r1v2.report.html import data_uri, template, write_page
from megatron_r1v2.report.preference_read import PreferencePairs, read_preferences
from megatron_r1v2.report.read import REWARD, Json, Run, mean_of, read_run

MAX_TEXT = 20_000
MAX_QUESTION = 600
"""Characters; the rest is shown on request."""
MAX_WORD = 200


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


def measures_of(evaluations: Sequence[Json]) -> list[Measure]:
    """Return the rows of the table of some evaluations; parts of the reward, such as functions of one's own, last."""
    parts = dict.fromkeys(key for row in evaluations for key in row if key.startswith(REWARD))
    return [*MEASURES, *(Measure(part, f"Reward: {part.removeprefix(REWARD)}") for part in parts)]


CONDITIONS = ("num_prompts", "runs", "temperature", "top_p", "seed")


def write_report(run_dir: Path | str, compare: tuple[str, str] | None = None) -> Path:
    """Write the report of a run, finished or still going.

    Args:
        compare: names of the evaluations to compare; None: the last one, and the first of the same prompts.

    Returns:
        The path of report.html in that folder.

    Raises:
        ValueError: the folder does not exist, or has no evaluation of such a name.
    """
    run = read_run(run_dir, compare)
    return write_page(run.path / "report.html", render(run))


def render(run: Run) -> str:
    """Return the page as HTML; all text from the run is escaped."""
    return template("report.html").render(
        name=run.name,
        folder=run.path,
        last_step=max(run.metrics, default=None),
        num_steps=run.recipe.get("train.steps"),
        facts=run_facts(run),
        changes=run.changes,
        cards=_cards(run),
        table=_table(run),
        groups=_groups(run),
        comparison=run.comparison,
        pairs=[
            {"change": pair.change, "first": shown_response(pair.before), "last": shown_response(pair.after)}
            for pair in (run.comparison.pairs if run.comparison else ())
        ],
        preferences=[_shown_pairs(pairs) for pairs in read_preferences(run)],
        rollouts={step: [shown_rollout(row) for row in rows] for step, rows in run.rollouts.items()},
        settings=run.settings,
        notes=run.notes,
    )


def _groups(run: Run) -> list[dict[str, object]]:
    """Return the charts under each heading, and the titles of those that are zero throughout."""
    groups: list[dict[str, object]] = []
    for section in SECTIONS:
        zero = [chart.title for chart in section.charts if is_zero(chart, run)]
        drawn = []
        for chart in section.charts:
            svg = None if chart.title in zero else draw(chart, run)
            if svg is not None:
                drawn.append((chart, svg))
        if drawn or zero:
            groups.append({"title": section.title, "charts": drawn, "zero": zero})
    return groups


def run_facts(run: Run) -> dict[str, str]:
    """Return which model was trained, when, by which commit, and on what."""
    last = run.starts[-1] if run.starts else {}
    processes = last.get("processes")
    facts = {
        "stage": run.recipe.get("run.stage") or last.get("stage"),
        "model": run.recipe.get("model.checkpoint") or run.recipe.get("model.hf_path"),
        "data": _data_text(run.recipe.get("data.train")),
        "began": _time(run.starts[0].get("time")) if run.starts else None,
        "starts": len(run.starts) if len(run.starts) > 1 else None,
        "version": " ".join(filter(None, (_word(last.get("version")), _word(last.get("commit"))))),
        "hardware": f"{processes} x {last.get('device')} ({last.get('host')})" if processes else None,
    }
    return {name: _word(value) for name, value in facts.items() if value}


def _data_text(value: object) -> object:
    """Return the data set of a recipe, or those of its mixture with their weights."""
    if not isinstance(value, list):
        return value
    return ", ".join(f"{entry.get('path')} x {entry.get('weight', 1)}" for entry in value if isinstance(entry, dict))


def _time(value: object) -> str:
    """Return a time of ISO 8601, which is in UTC here, as one reads it."""
    return _word(value).replace("T", " ").replace("+00:00", " UTC")


def _word(value: object) -> str:
    return str(value)[:MAX_WORD] if value else ""


def _cards(run: Run) -> list[tuple[str, str, str]]:
    """Return (title, value, remark) of the figures at the top."""
    cards = []
    first, last = _compared(run)
    for key, title in (("pass_at_1", "Pass@1"), ("hallucination_rate", "Hallucination")):
        if not _finite(last.get(key)):
            continue
        values = [_percent(value) for value in (first.get(key), last.get(key)) if _finite(value)]
        remark = f"{first['name']} and {last['name']}" if len(values) > 1 else str(last["name"])
        if key == "pass_at_1" and (interval := _interval(last)):
            remark += f"; 95 % interval of the last {interval}"
        coverage = last.get("claim_coverage")
        if key == "hallucination_rate" and _finite(coverage):
            remark = f"of claims; {_percent(coverage)} of responses make one"
        remark += f"; {size}" if (size := _size(last)) else ""
        cards.append((title, " \N{RIGHTWARDS ARROW} ".join(values), remark))
    third = max(1, len(run.metrics) // 3)
    end = slice(-third, None)
    reward = mean_of(run.metrics, "critic/rewards/mean", end)
    if reward is not None:
        start = mean_of(run.metrics, "critic/rewards/mean", slice(0, third))
        cards.append(("Reward", f"{start:.2f} \N{RIGHTWARDS ARROW} {reward:.2f}", "first and last third of the steps"))
    trained = mean_of(run.metrics, "ssb/trained_effective_fraction", end)
    fresh = mean_of(run.metrics, "ssb/fresh_effective_fraction", end)
    if trained is not None and fresh is not None:
        cards.append(("Effective, trained on", _percent(trained), f"{_percent(fresh)} of the fresh; last third"))
    _, seconds = run.series("timing_s/step")
    if seconds:
        # Not the mean: the first step holds what comes before it, such as the log-probs of the reference.
        cards.append(("A step takes", f"{statistics.median(seconds):.3g} s", "median of all steps"))
    return cards


def _table(run: Run) -> dict[str, object] | None:
    """Return the evaluation table: a column for each, and the change from the first to the last."""
    if not run.evaluations:
        return None
    compared = _compared(run)
    rows = []
    for measure in measures_of(run.evaluations):
        if any(_finite(row.get(measure.key)) for row in run.evaluations):
            cells = [measure_cell(row, measure) for row in run.evaluations]
            rows.append({"title": measure.title, "cells": cells, "change": _change(compared, measure)})
    names = [*CONDITIONS, *(["data"] if any(row.get("data") for row in run.evaluations) else [])]
    conditions = [{key: condition_text(row, key) for key in names} for row in run.evaluations]
    # Of prompts in both nobody asks where they were.
    paired = run.comparison is not None and bool(run.comparison.changes)
    differing = [key for key in names if all(compared) and _differs(compared, key) and not (paired and key == "data")]
    return {
        "names": [row["name"] for row in run.evaluations],
        "steps": [row.get("step") for row in run.evaluations],
        "dates": [_word(row.get("finished"))[:10] for row in run.evaluations],
        "sizes": [_size(row) for row in run.evaluations],
        "rows": rows,
        "conditions": conditions,
        "differing": differing,
        "compared": run.comparison is not None,
    }


def _size(row: Json) -> str:
    """Return the number of prompts behind the figures of an evaluation; "" where it does not say."""
    size, whole = row.get("num_prompts"), row.get("available", 0)
    return size_text(size, whole) if isinstance(size, int) and isinstance(whole, int) else ""


def _compared(run: Run) -> tuple[Json, Json]:
    """Return the two evaluations that are compared; of a single one nothing and that one."""
    if run.comparison is None:
        return {}, run.evaluations[-1] if run.evaluations else {}
    by_name = {row["name"]: row for row in run.evaluations}
    return by_name[run.comparison.first], by_name[run.comparison.last]


def measure_cell(row: Json, measure: Measure) -> str:
    """Return a figure of an evaluation as text, Pass@1 with its interval; "-" where it has none."""
    value = row.get(measure.key)
    if not _finite(value):
        return "-"
    text = _percent(value) if measure.percent else f"{value:.1f}"
    interval = _interval(row) if measure.key == "pass_at_1" else ""
    return f"{text} ({interval})" if interval else text


def _interval(row: Json) -> str:
    """Return the 95 % interval of Pass@1, such as "47.7 to 55.9"; "" where the evaluation has none."""
    return " to ".join(f"{100 * end:.1f}" for end in _interval_ends(row))


def _interval_ends(row: Json) -> list[float]:
    """Return both ends of the 95 % interval of Pass@1; an empty list where the evaluation has none."""
    ends = row.get("pass_at_1_interval")
    if not isinstance(ends, list) or len(ends) != 2 or not all(_finite(end) for end in ends):
        return []
    return ends


def _change(compared: Sequence[Json], measure: Measure) -> tuple[str, str]:
    """Return the difference of the last and the first as text, and whether it is "good", "bad" or neither ("")."""
    before, after = (row.get(measure.key) for row in compared)
    if not _finite(before) or not _finite(after):
        return "", ""
    difference = after - before
    text = f"{100 * difference:+.1f} points" if measure.percent else f"{difference:+.1f}"
    if measure.key == "pass_at_1" and _intervals_overlap(compared):
        return f"{text}, the intervals overlap", ""
    sign = (difference > 0) - (difference < 0)
    return text, {1: "good", -1: "bad", 0: ""}[sign * measure.better]


def _intervals_overlap(compared: Sequence[Json]) -> bool:
    """Return whether the 95 % intervals of Pass@1 overlap; False where one has none."""
    intervals = [_interval_ends(row) for row in compared]
    return all(intervals) and max(low for low, _ in intervals) <= min(high for _, high in intervals)


def condition_text(row: Json, key: str) -> str:
    """Return a condition of an evaluation as text: of a list its length, of a folder the end of its path."""
    value = row.get(key)
    if key == "data":
        return "/".join(Path(str(value or "")).parts[-2:]) or "-"
    return str(len(value)) if isinstance(value, list) else "-" if value is None else str(value)


def _differs(compared: Sequence[Json], key: str) -> bool:
    if key == "data" and not all(row.get(key) for row in compared):  # older files do not say
        return False
    first, second = (condition_text(row, key) for row in compared)
    return first != second


def _shown_pairs(pairs: PreferencePairs) -> dict[str, object]:
    columns = zip(pairs.chosen, pairs.rejected, pairs.margins, pairs.sources, strict=True)
    return {
        "folder": pairs.folder,
        "counts": pairs.counts,
        "pairs": [
            {
                "chosen": shown_rollout(chosen),
                "rejected": shown_rollout(rejected),
                "margin": margin,
                "source": source.replace("_", " "),
            }
            for chosen, rejected, margin, source in columns
        ],
    }


def shown_rollout(row: Json) -> dict[str, object]:
    """Return the fields that the templates show of a line of rollouts.jsonl, whatever is missing from it."""
    text = str(row.get("text") or "")
    if len(text) > MAX_TEXT:
        omitted = len(text) - MAX_TEXT
        text = f"{text[: MAX_TEXT // 2]}\n[... {omitted} characters left out ...]\n{text[-MAX_TEXT // 2 :]}"
    reasoning, end, answer = text.rpartition("</think>")
    rewards = row.get("rewards")
    claims = row.get("claims")
    question = str(row.get("question") or "")
    return {
        "key": row.get("prompt_key", ""),
        "question": question if len(question) <= MAX_QUESTION else f"{question[:MAX_QUESTION]} ...",
        "prompt": _whole_prompt(row.get("messages"), question),
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


def shown_response(row: Json) -> dict[str, object]:
    """Return the fields of a line of an evaluation, whose advantage of 0 means that nothing was trained."""
    return {**shown_rollout(row), "advantage": None}


def _whole_prompt(messages: object, question: str) -> str:
    """Return all turns of a prompt as text; "" where the question, as it is shown, is all of it."""
    turns = messages if isinstance(messages, list) else []
    text = "\n\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns if isinstance(turn, dict))
    return (text or (question if len(question) > MAX_QUESTION else ""))[: 2 * MAX_TEXT]


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
