"""What the paper reports: the rows of its table 1 for Skywork R1V2 (arXiv 2504.16656), to stand beside ours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """One benchmark."""

    benchmark: str
    """As in a sample's `metadata.benchmark`, or as its own harness calls it."""
    score: float
    """Percent."""
    remark: str = ""


TABLE_1 = (
    PaperRow("AIME 2024", 78.9),
    PaperRow("LiveCodeBench", 63.6, "by its own harness"),
    PaperRow("LiveBench", 73.2, "by its own harness"),
    PaperRow("IFEval", 82.9, "by its own harness"),
    PaperRow("BFCL", 66.3, "by its own harness"),
    PaperRow("MMMU", 73.6, "validation"),
    PaperRow("MathVista", 74.0, "testmini"),
    PaperRow("OlympiadBench", 62.6),
    PaperRow("MathVision", 49.0, "testmini"),
    PaperRow("MMMU-Pro", 52.0),
)
