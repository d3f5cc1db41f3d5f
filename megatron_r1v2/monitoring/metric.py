"""A row of the table of metrics, and the chart that shows it."""

from __future__ import annotations

from dataclasses import dataclass

FRACTION = "fraction"
BY_MODALITY = ("", "_image", "_text")
"""All responses, those to prompts with images, those to prompts without."""


@dataclass(frozen=True)
class Metric:
    """A number that is written once a step."""

    name: str
    """As in metrics.jsonl; `*` stands for anything."""
    unit: str
    meaning: str
    short: str = ""
    """On the console; the last part of the name where it is empty."""
    suffixes: tuple[str, ...] = ("",)
    """Each makes a metric of its own."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the name with each suffix."""
        return tuple(self.name + suffix for suffix in self.suffixes)


@dataclass(frozen=True)
class Chart:
    """One picture of the report."""

    title: str
    caption: str
    """The sentence below it: what a reader should look for."""
    metrics: tuple[Metric, ...]
    """Its curves, in this order."""
    stacked: bool = False
    minus: float = 0.0
    """The curves are drawn as the difference from this, which they are close to."""
    target: str = ""
    """A setting (section.key) of the recipe that is drawn as a line, if the run has a recipe."""

    @property
    def percent(self) -> bool:
        """Return whether the values are shown as 0 to 100 %."""
        return all(metric.unit == FRACTION for metric in self.metrics)


@dataclass(frozen=True)
class Section:
    """Charts under one heading."""

    title: str
    charts: tuple[Chart, ...]
