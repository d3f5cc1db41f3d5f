"""Curves over steps as inline SVG."""

from __future__ import annotations

import fnmatch
import io
import itertools
import math
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.typing import RcKeyType

from megatron_r1v2.monitoring.metrics import Chart
from megatron_r1v2.report.read import Run

MAX_POINTS = 240
MAX_LABEL = 60
COLORS = ("#2563ab", "#d1603d", "#2f8f6b", "#8a5aa8", "#b8892b", "#5b6b7b", "#c2487a", "#3aa0b5")

_STYLE: dict[RcKeyType, object] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "axes.edgecolor": "#c3cad3",
    "axes.labelcolor": "#5a6572",
    "xtick.color": "#5a6572",
    "ytick.color": "#5a6572",
    "axes.grid": True,
    "grid.color": "#e9edf1",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "path.simplify": True,
}


def draw(chart: Chart, run: Run, *, target: float | None = None) -> str | None:
    """Draw one chart.

    Args:
        target: a height to mark with a dashed line.

    Returns:
        An `<svg>` element, or None where the run has none of the metrics.
    """
    curves = _curves(chart, run)
    if not curves:
        return None
    # The salt makes the ids of clip paths and markers differ between the charts of one page.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": chart.title}):
        figure = Figure(figsize=(5.0, 2.55), layout="constrained")
        axes = figure.add_subplot()
        if chart.stacked:
            _draw_stack(axes, curves)
        else:
            _draw_lines(axes, curves)
        if target is not None:
            axes.axhline(target, color="#5a6572", linewidth=1, linestyle=(0, (4, 3)), label="target")
        _finish(axes, chart, rows=len(curves) + (target is not None))
        return _svg(figure)


Curve = tuple[str, list[float], list[float]]


def _curves(chart: Chart, run: Run) -> list[Curve]:
    """Return (label, steps, values) of each metric that the run has, finite values only."""
    names = sorted({name for values in run.metrics.values() for name in values})
    curves: list[Curve] = []
    patterns = [pattern for metric in chart.metrics for pattern in metric.names]
    for pattern in patterns:
        for name in fnmatch.filter(names, pattern):
            steps, values = run.series(name)
            kept = [(float(s), v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
            label = _label(name)
            if kept and label not in [curve[0] for curve in curves]:
                curves.append((label, *_thin([s for s, _ in kept], [v for _, v in kept])))
    return curves


def _label(name: str) -> str:
    if name == "critic/rewards/mean":
        return "total"
    _, _, rest = name.partition("/")
    if name.startswith("reward/"):
        rest = rest.removesuffix("/mean")
    # matplotlib cannot set control characters and half surrogate pairs.
    return "".join(c if c.isprintable() else "?" for c in (rest or name).replace("_", " "))[:MAX_LABEL]


def _thin(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Average neighbours until a long run fits the width of the picture."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    bounds = [round(i * len(steps) / MAX_POINTS) for i in range(MAX_POINTS + 1)]
    spans = list(itertools.pairwise(bounds))
    return [_mean(steps[a:b]) for a, b in spans], [_mean(values[a:b]) for a, b in spans]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _smooth(values: list[float]) -> list[float]:
    reach = max(1, len(values) // 30)
    return [_mean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _draw_lines(axes: Axes, curves: list[Curve]) -> None:
    for i, (label, steps, values) in enumerate(curves):
        color = COLORS[i % len(COLORS)]
        if len(values) >= 30:
            axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.9)
            axes.plot(steps, _smooth(values), color=color, linewidth=1.6, label=label)
        else:
            axes.plot(steps, values, color=color, linewidth=1.6, marker="o", markersize=2.8, label=label)


def _draw_stack(axes: Axes, curves: list[Curve]) -> None:
    """Stack the phases; what the whole step took beyond them is shown as "other"."""
    phases = {label: dict(zip(steps, values, strict=True)) for label, steps, values in curves}
    whole = phases.pop("step", {})
    steps = sorted({step for values in phases.values() for step in values} | set(whole))
    heights = {label: [max(0.0, values.get(step, 0.0)) for step in steps] for label, values in phases.items()}
    if whole:
        sums = [sum(column) for column in zip(*heights.values(), strict=True)] if heights else [0.0] * len(steps)
        heights["other"] = [max(0.0, whole.get(step, 0.0) - total) for step, total in zip(steps, sums, strict=True)]
    colors = [COLORS[i % len(COLORS)] for i in range(len(heights))]
    if len(steps) == 1:
        bottom = 0.0
        for (label, values), color in zip(heights.items(), colors, strict=True):
            axes.bar(steps, values, bottom=bottom, color=color, label=label, width=0.5)
            bottom += values[0]
    else:
        axes.stackplot(steps, *heights.values(), labels=list(heights), colors=colors, alpha=0.85, linewidth=0)


def _finish(axes: Axes, chart: Chart, *, rows: int) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    # matplotlib's own formatter factors out an offset or a power of ten, in small print above the axis.
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
    axes.margins(x=0.02)
    if axes.dataLim.y0 == axes.dataLim.y1 == 0:
        axes.set_ylim(0, 1)
    if chart.percent:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if chart.stacked:
        axes.set_ylabel("seconds")
        axes.set_ylim(bottom=0)
    if rows > 1:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, frameon=False, borderaxespad=0.2,
            handlelength=1.0, columnspacing=1.0, handletextpad=0.5, fontsize=9.5,
        )  # fmt: skip


def _svg(figure: Figure) -> str:
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    # HTML wants the bare element, without the XML prologue and its document type.
    return text[text.index("<svg") :].strip()
