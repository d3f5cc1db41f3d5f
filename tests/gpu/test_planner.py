"""The planner's activations beside those that the GPU's allocator saw."""

from __future__ import annotations

import pytest

from benchmarks.planner_activations import WIDE, measure_allocator, planned
from tests.ranks import run_ranks


@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.name)
def test_activations_are_within_five_percent_of_the_measured_peak(needs_cuda, case):
    (measured,) = run_ranks(1, measure_allocator, case, timeout=600)
    said = planned(case, 0)
    assert said["training"] == pytest.approx(measured["training"], rel=0.05)
    assert said["log_probs"] == pytest.approx(measured["log_probs"], rel=0.05)
