"""The curves of a chart, read back from its SVG."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_r1v2.monitoring.metric import FRACTION, Chart, Metric
from megatron_r1v2.monitoring.metrics import SECTIONS
from megatron_r1v2.report.charts import COLORS, MAX_POINTS, draw, draw_overlay, is_zero, run_color
from megatron_r1v2.report.read import Run

SVG = "{http://www.w3.org/2000/svg}"


def chart_of(title, *names, unit="nats", **options):
    return Chart(title, "", tuple(Metric(name, unit, "") for name in names), **options)


def make_run(**series):
    run = Run(Path())
    for name, values in series.items():
        for step, value in enumerate(values):
            run.metrics.setdefault(step, {})[name.replace("__", "/")] = value
    return run


def texts(svg):
    return [element.text for element in ET.fromstring(svg).iter(f"{SVG}text")]


def test_a_chart_without_data_is_not_drawn():
    assert draw(chart_of("Loss", "actor/loss"), make_run(actor__lr=[1.0])) is None
    assert draw(chart_of("Loss", "actor/loss"), make_run(actor__loss=[float("nan")])) is None


def test_labels_and_targets_are_in_the_legend():
    run = make_run(ssb__fresh_effective_fraction=[0.1, 0.2], ssb__trained_effective_fraction=[0.6, 0.6])
    run.recipe = {"buffer.target_effective_fraction": 0.6}
    found = texts(draw(chart_of("Effective", "ssb/*", unit=FRACTION, target="buffer.target_effective_fraction"), run))
    assert {"fresh effective fraction", "trained effective fraction", "target", "60%", "step"} <= set(found)


def test_parts_of_two_functions_with_one_name_are_two_curves():
    run = make_run(
        reward__near__shown__mean=[0.1, 0.2], reward__tone__shown__mean=[0.3, 0.4], reward__tone__mean=[0.5, 0.6]
    )
    found = texts(draw(chart_of("Reward", "reward/*/mean"), run))
    assert {"near/shown", "tone/shown", "tone"} <= set(found)


@pytest.fixture
def kept_axes(monkeypatch):
    """Return a list that gets the axes of every picture that is drawn."""
    kept = []
    finish = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self.axes[0]), finish(self, *a, **k))[1])
    return kept


def drawn_axes(kept_axes, chart, run):
    """Return the axes of a chart."""
    assert draw(chart, run) is not None
    return kept_axes[-1]


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [([0.04, 0.12], 0.0, 0.1240), ([0.0, 1.0], 0.0, 1.0), ([0.9, 1.0], 0.895, 1.0), ([0.1, 0.5], 0.0, 0.52)],
)
def test_the_axis_of_fractions_fits_the_curve(kept_axes, values, low, high):
    run = make_run(a__rate=values)
    bottom, top = drawn_axes(kept_axes, chart_of("Rate", "a/rate", unit=FRACTION), run).get_ylim()
    margin = 0.02 * (high - low)
    assert (bottom, top) == pytest.approx((low - margin, high + margin), abs=1e-9)


@pytest.mark.parametrize("values", [[0.998, 1.0], [0.0, 1.0], [0.04, 0.12], [0.0, 0.0003]])
def test_no_two_marks_of_an_axis_have_one_label(kept_axes, values):
    axes = drawn_axes(kept_axes, chart_of("Rate", "a/rate", unit=FRACTION), make_run(a__rate=values))
    axes.figure.canvas.draw()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(set(labels)) == len(labels) >= 4
    assert all(label.endswith("%") for label in labels)


def test_what_is_close_to_a_number_is_drawn_as_the_difference(kept_axes):
    run = make_run(train__error=[1.0, 1.0 + 2e-7, 1.0 + 4e-7])
    axes = drawn_axes(kept_axes, chart_of("Mismatch", "train/error", minus=1.0), run)
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0.0, 2e-7, 4e-7], abs=1e-12)


def test_noise_is_averaged_and_a_schedule_is_not(kept_axes):
    noisy = make_run(a__x=[float(i * 7919 % 13) for i in range(90)])
    axes = drawn_axes(kept_axes, chart_of("Noise", "a/x"), noisy)
    assert len(axes.lines) == 2
    assert axes.get_xlabel() == "step (bold: mean of 7 points)"
    schedule = make_run(a__x=[min(i / 10, 1.0 - i / 100) for i in range(90)])
    axes = drawn_axes(kept_axes, chart_of("Schedule", "a/x"), schedule)
    assert len(axes.lines) == 1
    assert list(axes.lines[0].get_ydata()) == schedule.series("a/x")[1]
    assert axes.get_xlabel() == "step"


def test_suffixes_are_the_labels_of_one_metric():
    metric = Metric("train/error", "ratio", "", suffixes=("", "_image"))
    run = make_run(train__error=[1.0, 2.0], train__error_image=[1.0, 3.0])
    assert {"all", "image"} <= set(texts(draw(Chart("Mismatch", "", (metric,)), run)))


def test_a_chart_of_zeros_is_known(monkeypatch):
    chart = chart_of("Trouble", "a/x", "a/y")
    assert is_zero(chart, make_run(a__x=[0.0, 0.0]))
    assert not is_zero(chart, make_run(a__x=[0.0, 0.0], a__y=[0.0, 1.0]))
    assert not is_zero(chart, make_run(a__z=[0.0]))


def test_a_metric_that_two_patterns_match_is_drawn_once():
    run = make_run(rollout_corr__kl=[1.0, 2.0], rollout_corr__k3_kl=[1.0, 2.0])
    found = texts(draw(chart_of("Divergence", "rollout_corr/*kl*", "rollout_corr/kl"), run))
    assert (found.count("kl"), found.count("k3 kl")) == (1, 1)


def test_phases_are_stacked_up_to_the_whole_step():
    run = make_run(timing_s__generate=[1.0, 2.0], timing_s__update=[1.0, 1.0], timing_s__step=[3.0, 4.0])
    chart = chart_of("Seconds", "timing_s/*", stacked=True)
    found = texts(draw(chart, run))
    assert {"generate", "update", "other", "seconds"} <= set(found)
    assert "step" not in found[found.index("generate") :]
    one_step = make_run(timing_s__generate=[1.0], timing_s__step=[3.0])
    assert {"generate", "other"} <= set(texts(draw(chart, one_step)))


def test_a_long_run_is_thinned_to_the_width_of_the_picture():
    svg = draw(chart_of("Loss", "actor/loss"), make_run(actor__loss=[float(i % 2) for i in range(50_000)]))
    paths = [element.get("d") for element in ET.fromstring(svg).iter(f"{SVG}path")]
    assert max(path.count("L") for path in paths) <= MAX_POINTS


def test_the_phases_of_the_report_add_up_to_the_step(monkeypatch):
    """The lead that preemption leaves is not a phase: it may be hundreds of seconds, and below zero."""
    (chart,) = (chart for section in SECTIONS for chart in section.charts if chart.stacked)
    stacked = {}

    def stackplot(self, steps, *heights, labels, **options):
        stacked.update(zip(labels, heights, strict=True))

    monkeypatch.setattr(Axes, "stackplot", stackplot)
    run = make_run(
        timing_s__generate=[1.0, 2.0],
        timing_s__update=[1.0, 1.5],
        timing_s__step=[3.0, 4.0],
        preemption__lead_margin_s=[-500.0, 80.0],
    )
    draw(chart, run)
    assert stacked == {"generate": [1.0, 2.0], "update": [1.0, 1.5], "other": [1.0, 0.5]}


def test_phases_of_a_long_run_add_up_too(monkeypatch):
    """A phase of every tenth step has fewer points than the others, and must not be averaged over other steps."""
    count = 10 * MAX_POINTS
    stacked = {}

    def stackplot(self, steps, *heights, labels, **options):
        stacked.update(zip(labels, heights, strict=True), steps=steps)

    monkeypatch.setattr(Axes, "stackplot", stackplot)
    run = make_run(timing_s__generate=[1.0] * count, timing_s__step=[3.0] * count)
    for step in range(0, count, 10):
        run.metrics[step] |= {"timing_s/evaluate": 20.0, "timing_s/step": 23.0}
    draw(chart_of("Seconds", "timing_s/*", stacked=True), run)
    steps = stacked.pop("steps")
    assert len(steps) == MAX_POINTS
    assert set(stacked) == {"generate", "evaluate", "other"}
    assert stacked["evaluate"] == pytest.approx([2.0] * MAX_POINTS)
    sums = [sum(column) for column in zip(*stacked.values(), strict=True)]
    assert sums == pytest.approx([5.0] * MAX_POINTS)


def test_small_phases_are_part_of_the_rest_and_no_two_share_a_colour(monkeypatch):
    drawn = {}

    def stackplot(self, steps, *heights, labels, colors, **options):
        drawn.update(heights=dict(zip(labels, heights, strict=True)), colors=colors)

    monkeypatch.setattr(Axes, "stackplot", stackplot)
    phases = {f"timing_s__{name}": [1.0 + place, 1.0] for place, name in enumerate("abcdefghij")}
    run = make_run(**phases, timing_s__tiny=[0.01, 0.0], timing_s__step=[100.0, 50.0])
    draw(chart_of("Seconds", "timing_s/*", stacked=True), run)
    assert list(drawn["heights"]) == [*"cdefghij", "other"]
    assert len(set(drawn["colors"])) == len(COLORS) + 1
    assert [sum(column) for column in zip(*drawn["heights"].values(), strict=True)] == [100.0, 50.0]


def test_a_first_step_that_sets_up_does_not_hide_the_others(kept_axes):
    run = make_run(timing_s__reference=[58.0], timing_s__update=[0.5] * 5, timing_s__step=[60.0, 1.0, 1.0, 2.0, 1.0])
    chart = chart_of("Seconds", "timing_s/*", stacked=True)
    axes = drawn_axes(kept_axes, chart, run)
    assert axes.get_ylim() == pytest.approx((0.0, 2.2))
    assert [text.get_text() for text in axes.texts] == ["step 0: 60 s"]
    run.metrics[0]["timing_s/step"] = run.metrics[0]["timing_s/reference"] = 3.0
    axes = drawn_axes(kept_axes, chart, run)
    assert axes.get_ylim()[1] > 3.0
    assert not axes.texts


def strokes(svg):
    """Return the colours of the curves of a picture."""
    return {color for color in COLORS if f"stroke: {color}" in svg}


def test_runs_of_an_overlay_keep_their_colours_in_every_picture():
    first = make_run(a__x=[1.0, 2.0], a__y=[1.0, 2.0])
    second = make_run(a__y=[2.0, 3.0], a__z=[0.0, 0.0])
    pictures = dict(draw_overlay(chart_of("Pair", "a/x", "a/y", "a/z"), [first, second]))
    assert {label: strokes(svg) for label, svg in pictures.items()} == {
        "x": {COLORS[0]},
        "y": {COLORS[0], COLORS[1]},
    }
    assert draw_overlay(chart_of("Pair", "b/x"), [first, second]) == []


def test_runs_beyond_the_colours_have_other_lines():
    marks = [run_color(number) for number in range(3 * len(COLORS))]
    assert len(set(marks)) == len(marks)
    svg = draw_overlay(chart_of("Loss", "a/x"), [make_run(a__x=[float(n), 1.0]) for n in range(len(COLORS) + 1)])[0][1]
    assert "stroke-dasharray" in svg


TARGET = "buffer.target_effective_fraction"


@pytest.mark.parametrize(
    ("targets", "colors"),
    [((0.6, 0.6), ["#5a6572"] * 2), ((0.6, 0.3), list(COLORS[:2])), ((0.6, 0.0), [COLORS[0]]), ((0.0, 0.0), [])],
)
def test_an_overlay_marks_the_target_of_each_run_and_its_changes_of_settings(kept_axes, targets, colors):
    runs = [make_run(a__x=[0.1, 0.2, 0.3, 0.4]), make_run(a__x=[0.2, 0.3, 0.4, 0.5]), make_run(a__y=[0.5, 0.4])]
    for run, target in zip(runs, (*targets, 0.9), strict=True):
        run.recipe = {TARGET: target}
    runs[1].changes = {2: ["generation.temperature: 1.0 -> 0.7"]}
    draw_overlay(chart_of("Pair", "a/x", "a/y", target=TARGET), runs)
    x, y = ([line for line in axes.lines if line.get_linewidth() == 1] for axes in kept_axes)
    (change,) = (line for line in x if line.get_ydata()[0] != line.get_ydata()[1])
    assert (list(change.get_xdata()), change.get_color()) == ([2.5, 2.5], COLORS[1])
    level = [line for line in x if line is not change]
    assert [line.get_color() for line in level] == colors
    assert [line.get_ydata()[0] for line in level] == [target for target in targets if target]
    assert [(line.get_ydata()[0], line.get_color()) for line in y] == [(0.9, "#5a6572")]
