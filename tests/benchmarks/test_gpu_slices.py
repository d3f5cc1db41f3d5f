"""The benchmark of true-size slices runs; what it measures at these sizes means nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_slices
from benchmarks.gpu_slices import TINY, main, measure, tiny_architecture
from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.planning.known_models import KNOWN_MODELS
from megatron_r1v2.planning.roofline import language_layer_flops
from tests.ranks import run_ranks


def measure_tiny() -> dict[str, Any]:
    return measure(TINY, tiny_architecture())


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_ranks(1, measure_tiny)[0]


def test_every_slice_has_numbers_against_the_ceilings_of_its_run(found):
    assert found["errors"] == {}
    ceilings = found["ceilings"]
    assert ceilings["bf16 FLOP/s"] > 0
    assert ceilings["bytes/s"] > 0
    for part in ("vision", "language"):
        for name in ("forward", "forward and backward"):
            rate = found[part][f"{name} FLOP/s"]
            assert found[part][f"{name} of the ceiling"] == pytest.approx(rate / ceilings["bf16 FLOP/s"])
            assert found[part][f"{name} seconds"] > 0
    decode = found["language"]["decode"]
    assert decode["tokens/s"] == pytest.approx(TINY.requests / decode["step seconds"])
    assert decode["of the copy ceiling"] == pytest.approx(decode["bytes/s"] / ceilings["bytes/s"])


def measure_with_a_fault(output: Path) -> int:
    def fail(*_: Any, **__: Any) -> dict[str, float]:
        raise torch.OutOfMemoryError("no room for a cache")

    gpu_slices.measure_decode = fail
    return main(["--tiny", f"--output={output}"])


def test_a_slice_that_fails_keeps_what_it_measured_and_the_others(tmp_path):
    output = tmp_path / "found.json"
    assert run_ranks(1, measure_with_a_fault, output) == [1]
    found = json.loads(output.read_text())
    assert found["errors"] == {"language": "OutOfMemoryError: no room for a cache"}
    assert found["language"]["forward and backward FLOP/s"] > 0
    assert found["vision"]["forward and backward FLOP/s"] > 0


def test_operations_are_those_of_the_slice(found):
    """By hand: 4 layers, each 2 x 128 x (2 x 128 + 2 x 32 + 3 x 256) a token and attention over half of 64 tokens."""
    layers = 4 * 64 * (2 * 128 * (2 * 128 + 2 * 32 + 3 * 256) + 4 * 128 * 32)
    head = 2 * 64 * 128 * 512
    language = found["language"]
    assert language["forward FLOP/s"] * language["forward seconds"] == pytest.approx(layers + head)
    both = language["forward and backward FLOP/s"] * language["forward and backward seconds"]
    assert both == pytest.approx(3 * (layers + head))
    real = r1v2_architecture(KNOWN_MODELS["r1v2-38b"])
    assert language_layer_flops(real, 1, 0) / 64 == pytest.approx(2 * 487_587_840)


def test_without_a_device_sizes_have_to_be_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert "there is no CUDA device: give --tiny, or --layers and --vision-layers" in capsys.readouterr().err
