"""The curves of a chart, read back from its SVG."""

import xml.etree.ElementTree as ET
from pathlib import Path

from matplotlib.axes import Axes

from megatron_r1v2.monitoring.metrics import FRACTION, SECTIONS, Chart, Metric
from megatron_r1v2.report.charts import MAX_POINTS, draw
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
    found = texts(draw(chart_of("Effective", "ssb/*", unit=FRACTION), run, target=0.6))
    assert {"fresh effective fraction", "trained effective fraction", "target", "100%", "step"} <= set(found)


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
