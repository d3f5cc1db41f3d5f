"""A row of the table of metrics, and its chart."""

from megatron_r1v2.monitoring.metric import BY_MODALITY, FRACTION, Chart, Metric


def test_a_metric_has_a_name_for_each_suffix() -> None:
    assert Metric("actor/loss", "loss", "The loss.").names == ("actor/loss",)
    assert Metric("a/b", "nats", "B.", suffixes=BY_MODALITY).names == ("a/b", "a/b_image", "a/b_text")


def test_a_chart_is_in_percent_where_every_curve_is_a_fraction() -> None:
    fraction, seconds = Metric("a", FRACTION, "A."), Metric("b", "s", "B.")
    assert Chart("", "", (fraction,)).percent
    assert not Chart("", "", (fraction, seconds)).percent
