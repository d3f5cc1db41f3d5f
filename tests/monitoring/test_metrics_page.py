"""docs/metrics.md is what the table of metrics says, and the page says all of it."""

import subprocess
import sys
from pathlib import Path

from megatron_r1v2.monitoring.metrics import METRICS, NOT_CHARTED, SECTIONS
from megatron_r1v2.monitoring.metrics_page import metrics_page

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_documentation_is_what_the_table_says():
    assert PAGE.read_text(encoding="utf-8") == metrics_page(), "run `make docs`"


def test_each_metric_is_a_row_below_the_heading_of_its_charts():
    sections = dict(part.split("\n\n", 1) for part in metrics_page().split("\n## ")[1:])
    assert list(sections) == [*(section.title for section in SECTIONS), "Without a chart"]
    rows = [line for text in sections.values() for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [metric.name for metric in METRICS]
    assert sections["Without a chart"].count("| `") == len(NOT_CHARTED)


def test_a_row_has_name_suffixes_unit_and_meaning():
    assert (
        "| `rollout_corr/log_prob_abs_diff` (`_image`, `_text`) | nats | Mean \\|engine - training\\| of a token. |\n"
        in metrics_page()
    )


def test_the_module_writes_the_page():
    """As `make docs` runs it."""
    module = "megatron_r1v2.monitoring.metrics_page"
    result = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, check=True)
    assert result.stdout == metrics_page()
