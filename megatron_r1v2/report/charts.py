"""Curves over steps as inline SVG."""

from __future__ import annotations

import fnmatch
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import RcKeyType

from megatron_r1v2.monitoring.metric import Chart, Metric
from megatron_r1v2.report.read import Run

MAX_POINTS = 240
MAX_LABEL = 60
MIN_SMOOTHED = 30
"""Points of a curve that may be averaged."""
COLORS = ("#2563ab", "#d1603d", "#2f8f6b", "#8a5aa8", "#b8892b", "#5b6b7b", "#c2487a", "#3aa0b5")

_OTHER_COLOR = "#aab4be"
_TARGET_COLOR = "#5a6572"
_CHANGE_COLOR = "#b8892b"
_LEAST_SHARE = 0.01
"""Of all phases: a smaller one is a line of no height."""
LINE_STYLES = ("-", "--", ":")
"""Of runs beyond the colours."""

Curve = tuple[str, list[float], list[float]]
"""Its label, steps and values."""

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


def draw(chart: Chart, run: Run) -> str | None:
    """Draw one chart, with the target of the recipe and the steps after which settings changed.

    Returns:
        An `<svg>` element, or None where the run has none of the metrics.
    """
    curves = _curves(chart, run)
    if not curves:
        return None
    with _canvas(chart.title) as axes:
        averaged = 1
        if chart.stacked:
            _draw_stack(axes, curves)
        else:
            averaged = max(_draw_line(axes, curve, number) for number, curve in enumerate(_thinned(curves)))
        if (target := target_of(chart, run)) is not None:
            _mark_target(axes, target, _TARGET_COLOR)
        _mark_changes(axes, run, _CHANGE_COLOR)
        _finish(axes, chart, averaged=averaged)
        _add_legend(axes)
        return _svg(axes)


def draw_overlay(chart: Chart, runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Draw each metric of a chart for several runs, of which every one has its `run_color` in all pictures.

    Its changes of settings are lines of that colour, and so is its target, unless all runs have the same one.

    Returns:
        The label of each metric that a run has, and its `<svg>` element; metrics that are zero in all are left out.
    """
    by_label: dict[str, dict[int, Curve]] = {}
    for number, run in enumerate(runs):
        for curve in _thinned(_curves(chart, run)):
            by_label.setdefault(curve[0], {})[number] = curve
    pictures = []
    for label, of_runs in by_label.items():
        if not any(value for _, _, values in of_runs.values() for value in values):
            continue
        # The label makes the ids of two pictures of one chart differ.
        with _canvas(f"{chart.title} {label}") as axes:
            averaged = max(_draw_line(axes, curve, number) for number, curve in of_runs.items())
            targets = {number: target_of(chart, runs[number]) for number in of_runs}
            for number, target in targets.items():
                color, _ = run_color(number)
                if target is not None:
                    _mark_target(axes, target, _TARGET_COLOR if len({*targets.values()}) == 1 else color)
                _mark_changes(axes, runs[number], color)
            _finish(axes, chart, averaged=averaged)
            pictures.append((label, _svg(axes)))
    return pictures


def run_color(number: int) -> tuple[str, str]:
    """Return the colour and the line style of a run, or of a curve, by its place."""
    return COLORS[number % len(COLORS)], LINE_STYLES[number // len(COLORS) % len(LINE_STYLES)]


def target_of(chart: Chart, run: Run) -> float | None:
    """Return the height that the recipe of a run sets for a chart; None where it sets none."""
    target = run.recipe.get(chart.target)
    # A target of 0 is one that was not set.
    return float(target) if isinstance(target, (int, float)) and target else None


def is_zero(chart: Chart, run: Run) -> bool:
    """Return whether a chart would show nothing but zeros."""
    curves = _curves(chart, run)
    return bool(curves) and not any(value for _, _, values in curves for value in values)


@contextmanager
def _canvas(name: str) -> Iterator[Axes]:
    """Give the axes of one picture.

    Args:
        name: different for each picture of a page, so that the ids of clip paths and markers are too.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        yield Figure(figsize=(5.0, 2.55), layout="constrained").add_subplot()


def _curves(chart: Chart, run: Run) -> list[Curve]:
    """Return (label, steps, values) of each metric that the run has, finite values only."""
    names = sorted({name for values in run.metrics.values() for name in values})
    curves: list[Curve] = []
    for metric in chart.metrics:
        for suffix, pattern in zip(metric.suffixes, metric.names, strict=True):
            for name in fnmatch.filter(names, pattern):
                steps, values = run.series(name)
                kept = [(float(s), v - chart.minus) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
                label = _label(chart, metric, name, suffix)
                if kept and label not in [curve[0] for curve in curves]:
                    curves.append((label, [s for s, _ in kept], [v for _, v in kept]))
    return curves


def _thinned(curves: Sequence[Curve]) -> list[Curve]:
    return [(label, *_thin(steps, values)) for label, steps, values in curves]


def _label(chart: Chart, metric: Metric, name: str, suffix: str) -> str:
    base = metric.short or name.removesuffix(suffix).removesuffix("/mean").rpartition("/")[2]
    if "*" in metric.name:
        # All of it: two reward functions may have parts of one name.
        start, _, end = metric.name.partition("*")
        base = name.removeprefix(start).removesuffix(end)
    if len(metric.suffixes) > 1:
        kind = suffix or "all"
        base = kind if len(chart.metrics) == 1 else f"{base} {kind}"
    # matplotlib cannot set control characters and half surrogate pairs.
    return "".join(c if c.isprintable() else "?" for c in base.replace("_", " ").strip())[:MAX_LABEL]


def _thin(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Average neighbours until a long run fits the width of the picture."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    bounds = [round(i * len(steps) / MAX_POINTS) for i in range(MAX_POINTS + 1)]
    spans = list(itertools.pairwise(bounds))
    return [_mean(steps[a:b]) for a, b in spans], [_mean(values[a:b]) for a, b in spans]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _reach(values: Sequence[float]) -> int:
    """Return how many neighbours on each side a noisy curve is averaged over; 0: it is shown as it is."""
    if len(values) < MIN_SMOOTHED:
        return 0
    # A curve that only rises and falls once goes twice over its range; noise goes over it again and again.
    way = sum(abs(b - a) for a, b in itertools.pairwise(values))
    return max(1, len(values) // 30) if way > 4 * (max(values) - min(values)) else 0


def _draw_line(axes: Axes, curve: Curve, number: int) -> int:
    """Draw a curve, a noisy one pale with its mean above; return how many points the mean is over."""
    label, steps, values = curve
    color, style = run_color(number)
    if reach := _reach(values):
        means = [_mean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
        axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.9)
        axes.plot(steps, means, color=color, linewidth=1.6, linestyle=style, label=label)
        return 2 * reach + 1
    marker = "o" if len(values) < MIN_SMOOTHED else None
    axes.plot(steps, values, color=color, linewidth=1.6, linestyle=style, marker=marker, markersize=2.8, label=label)
    return 1


def _draw_stack(axes: Axes, curves: list[Curve]) -> None:
    """Stack the phases; what the whole step took beyond them, and the smallest of them, is shown as "other"."""
    phases = {label: dict(zip(steps, values, strict=True)) for label, steps, values in curves}
    whole = phases.pop("step", {})
    steps = sorted({step for values in phases.values() for step in values} | set(whole))
    heights = {label: [max(0.0, values.get(step, 0.0)) for step in steps] for label, values in phases.items()}
    if whole:
        heights = _largest(heights)
        sums = [sum(column) for column in zip(*heights.values(), strict=True)] if heights else [0.0] * len(steps)
        heights["other"] = [max(0.0, whole.get(step, 0.0) - total) for step, total in zip(steps, sums, strict=True)]
    # All alike, and a phase of some steps only with its zeros: otherwise the means would not add up to the step.
    heights = {label: _thin(steps, values)[1] for label, values in heights.items()}
    steps, _ = _thin(steps, steps)
    colors = [_OTHER_COLOR if label == "other" else COLORS[i % len(COLORS)] for i, label in enumerate(heights)]
    if len(steps) == 1:
        bottom = 0.0
        for (label, values), color in zip(heights.items(), colors, strict=True):
            axes.bar(steps, values, bottom=bottom, color=color, label=label, width=0.5)
            bottom += values[0]
    else:
        labels = list(heights)
        # Bars without gaps: a slope would say that a phase of every tenth step grows before it.
        axes.stackplot(steps, *heights.values(), labels=labels, colors=colors, alpha=0.85, linewidth=0, step="mid")
        _fit_to_later_steps(axes, steps, [sum(column) for column in zip(*heights.values(), strict=True)])


def _largest(heights: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the phases that can be seen, at most one for each colour, in their order."""
    sums = {label: sum(values) for label, values in heights.items()}
    seen = [label for label in sums if sums[label] > _LEAST_SHARE * sum(sums.values())]
    kept = sorted(seen, key=lambda label: -sums[label])[: len(COLORS)]
    return {label: values for label, values in heights.items() if label in kept}


def _fit_to_later_steps(axes: Axes, steps: Sequence[float], totals: Sequence[float]) -> None:
    """Let a first step that takes far longer than all others, since it sets up, end above the picture, and say so."""
    later = max(totals[1:])
    if totals[0] > 3 * later > 0:
        axes.set_ylim(top=1.1 * later)
        text = f"step {steps[0]:.0f}: {totals[0]:.3g} s"
        axes.annotate(text, (0.04, 0.97), xycoords="axes fraction", va="top", fontsize=9, color="#5a6572")


def _mark_target(axes: Axes, height: float, color: str) -> None:
    axes.axhline(height, color=color, linewidth=1, linestyle=(0, (4, 3)), label="target")


def _mark_changes(axes: Axes, run: Run, color: str) -> None:
    """Draw a line after each step at which a run went on with other settings."""
    for step in run.changes:
        axes.axvline(step + 0.5, color=color, linewidth=1, linestyle=(0, (1, 2)))


def _finish(axes: Axes, chart: Chart, *, averaged: int) -> None:
    axes.set_xlabel("step" if averaged == 1 else f"step (bold: mean of {averaged} points)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    # matplotlib's own formatter factors out an offset or a power of ten, in small print above the axis.
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
    axes.margins(x=0.02)
    if chart.stacked:
        axes.set_ylabel("seconds")
        axes.set_ylim(bottom=0)
    elif chart.percent:
        _fit_percent(axes)


def _add_legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        longest = max(map(len, labels))
        axes.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=max(1, min(4, 64 // (longest + 5))),
            frameon=False, borderaxespad=0.2, handlelength=1.0, columnspacing=1.0, handletextpad=0.5, fontsize=9.5,
        )  # fmt: skip


def _fit_percent(axes: Axes) -> None:
    """Fit the axis of fractions to the curves: from 0 unless they all lie high, up to 1 at most."""
    low, high = axes.get_ylim()
    bottom = 0.0 if low < 0.6 * high else max(0.0, low)
    top = min(1.0, high) if high > 0 else 1.0
    margin = 0.02 * (top - bottom)
    axes.set_ylim(bottom - margin, top + margin)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.6g}%")


def _svg(axes: Axes) -> str:
    figure = axes.figure.get_figure(root=True)
    assert figure is not None
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    # HTML wants the bare element, without the XML prologue and its document type.
    return text[text.index("<svg") :].strip()
