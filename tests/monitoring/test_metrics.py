"""Every metric that the sources name is in the table, and every row of the table is written."""

import ast
import fnmatch
import re
from collections import Counter
from pathlib import Path

import pytest

from megatron_r1v2.monitoring.metric import FRACTION
from megatron_r1v2.monitoring.metrics import (
    METRICS,
    NOT_CHARTED,
    SECTIONS,
    console_name,
    find_metric,
)

ROOT = Path(__file__).parents[2]
PREFIXES = {metric.name.partition("/")[0] for metric in METRICS}


def texts_of(source):
    """Yield every string, what an f-string puts in as `*`."""
    tree = ast.parse(source)
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "*" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def metric_names(source):
    """Return the strings that look like a metric: one of the table's first words, and words after slashes."""
    found = (text for text in texts_of(source) if re.fullmatch(r"[a-z_]+(/[a-z0-9_*]+)+", text))
    return {text for text in found if text.partition("/")[0] in PREFIXES}


def is_known(name):
    """Return whether a name, or one that an f-string can make, is in the table."""
    if "*" not in name:
        return find_metric(name) is not None
    return any(fnmatch.fnmatchcase(known, name) for metric in METRICS for known in metric.names)


ROOMS = ("rl", "rewards", "training", "stages", "resilience", "monitoring", "evaluation", "report", "generation")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / "megatron_r1v2" / room).rglob("*.py"))


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "examples").rglob("*.py"))], ids=lambda path: path.stem)
def test_every_metric_in_the_sources_is_in_the_table(path):
    unknown = {name for name in metric_names(path.read_text(encoding="utf-8")) if not is_known(name)}
    assert not unknown, f"add to megatron_r1v2/monitoring/metrics.py, or mend the name: {unknown}"


def test_every_row_of_the_table_is_written_by_the_program():
    tables = [ROOT / "megatron_r1v2" / "monitoring" / name for name in ("metrics.py", "machine_metrics.py")]
    written = {
        name for path in SOURCES if path not in tables for name in metric_names(path.read_text(encoding="utf-8"))
    }
    unwritten = [m.name for m in METRICS if not any(fnmatch.fnmatchcase(m.name, name) for name in written)]
    assert not unwritten, f"remove from megatron_r1v2/monitoring/metrics.py: {unwritten}"


def test_a_name_that_is_not_in_the_table_would_be_found():
    source = 'note({"actor/loss": 1.0, "actor/losss": 2.0, f"ssb/{name}": 3.0, f"reward_model/x{name}": 4.0})'
    assert metric_names(source) == {"actor/loss", "actor/losss", "ssb/*", "reward_model/x*"}
    assert [name for name in sorted(metric_names(source)) if not is_known(name)] == ["actor/losss", "reward_model/x*"]


def test_each_name_is_one_row_with_a_unit_and_a_sentence():
    names = Counter(name for metric in METRICS for name in metric.names)
    assert [name for name, count in names.items() if count > 1] == []
    for metric in METRICS:
        assert metric.unit
        assert metric.meaning.endswith("."), metric
        assert find_metric(metric.name.replace("*", "answer")) == metric


def test_a_row_is_found_by_any_of_its_names():
    assert find_metric("rollout_corr/kl") is find_metric("rollout_corr/kl_image") is not None
    assert find_metric("reward/answer/mean") == find_metric("reward/format/mean")
    assert find_metric("reward/answer") is None
    assert find_metric("timing_s/lead_margin") is None
    assert find_metric("preemption/lead_margin_s") in NOT_CHARTED


def test_console_names_are_short_and_differ():
    assert console_name("critic/rewards/mean") == "reward"
    assert console_name("reward/answer/mean") == "answer"
    assert console_name("actor/loss") == "loss"
    assert console_name("rewards/margins") == "margin"


def test_a_chart_is_in_percent_where_all_its_curves_are_fractions():
    charts = {chart.title: chart for section in SECTIONS for chart in section.charts}
    assert charts["Validation"].percent
    assert not charts["Calibrator"].percent
    assert {metric.unit for metric in charts["Seconds by phase"].metrics} == {"s"}
    assert all(metric.unit == FRACTION for metric in charts["Ranking"].metrics)
