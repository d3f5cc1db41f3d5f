"""The speed of a step, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1v2.stages.align import supervised_step
from megatron_r1v2.stages.session import open_session
from megatron_r1v2.training.speed import StepSpeed, peak_flops
from tests.stages.runs import read_metrics, recipe_for


def test_tokens_and_operations_a_second() -> None:
    speed = StepSpeed(flops_per_token=6.0, peak_flops=100.0)
    values = {"perf/update_tokens": 50.0, "timing_s/update": 10.0}
    assert speed.metrics(values) == {"perf/update_tokens_per_second": 5.0, "perf/mfu/actor": 0.3}
    assert StepSpeed(6.0, None).metrics(values) == {"perf/update_tokens_per_second": 5.0}
    assert speed.metrics({"timing_s/update": 10.0}) == {}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("CPU", None),
    ],
)
def test_the_peak_is_that_of_the_gpu_with_that_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_a_run_tells_its_speed(root: Path, tmp_path: Path) -> None:
    with open_session(recipe_for(root, tmp_path / "run", stage="align"), stage="align", shown=()) as session:
        supervised_step(session)
        session.end_step()
        language = session.model.language
        matrices = [
            parameter for name, parameter in language.named_parameters() if parameter.dim() > 1 and "emb" not in name
        ]
        # Frozen: forward, and the gradient of what goes in.
        assert session.speed.flops_per_token == 4 * sum(parameter.numel() for parameter in matrices) > 0
    (line,) = read_metrics(tmp_path / "run")
    expected = line["perf/update_tokens"] / line["timing_s/update"]
    assert line["perf/update_tokens_per_second"] == pytest.approx(expected)
    assert line["timing_s/data"] > 0
    assert "perf/mfu/actor" not in line
