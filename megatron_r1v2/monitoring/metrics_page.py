"""docs/metrics.md, made from the table of metrics: `make docs` writes it."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from megatron_r1v2.monitoring.metric import Metric
from megatron_r1v2.monitoring.metrics import NOT_CHARTED, SECTIONS

_INTRODUCTION = """\
# Metrics

Each step is a line of `metrics.jsonl` in the run's folder; wandb and TensorBoard get the same names. A
metric that has no value in a step is not in its line. `*` stands for a name; (`_image`, `_text`) means that
the metric exists for prompts with and without images too. Made from `megatron_r1v2/monitoring/metrics.py`
by `make docs`.
"""


def metrics_page() -> str:
    """Return the text of the page: a table for each section of the report, and one of what has no chart."""
    charted = [_table(section.title, (m for chart in section.charts for m in chart.metrics)) for section in SECTIONS]
    return "\n".join([_INTRODUCTION, *charted, _table("Without a chart", NOT_CHARTED)])


def _table(title: str, metrics: Iterable[Metric]) -> str:
    lines = [f"## {title}", "", "| metric | unit | meaning |", "| --- | --- | --- |"]
    for metric in metrics:
        suffixes = ", ".join(f"`{suffix}`" for suffix in metric.suffixes if suffix)
        # A bar inside a cell would end it.
        meaning = metric.meaning.replace("|", "\\|")
        lines.append(f"| `{metric.name}`{f' ({suffixes})' if suffixes else ''} | {metric.unit} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(metrics_page())
