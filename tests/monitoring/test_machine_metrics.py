"""The rows of time and the machine."""

from megatron_r1v2.monitoring.machine_metrics import TIME


def test_the_charts_of_time_and_the_machine_have_one_unit_each() -> None:
    units = {chart.title: {metric.unit for metric in chart.metrics} for chart in TIME.charts}
    assert units["Seconds by phase"] == units["Waiting for responses"] == {"s"}
    assert units["GPU memory"] == {"GiB"}
    assert units["Speed"] == {"tokens/s"}


def test_the_phases_are_stacked_and_the_whole_step_is_among_them() -> None:
    (phases,) = (chart for chart in TIME.charts if chart.stacked)
    assert "timing_s/step" in {metric.name for metric in phases.metrics}
