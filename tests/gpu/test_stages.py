"""Whole stages on the GPU: their own code finds the device."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1v2.rl.mismatch import MEAN_ABSOLUTE_DIFFERENCE
from tests.benchmarks.test_gpu_slices import measure_tiny
from tests.gpu.test_training import needs_te
from tests.ranks import run_ranks
from tests.stages.runs import read_metrics, recipe_for, run_stage


def mismatch(lines: list[dict[str, float]]) -> float:
    """Return the largest mean |engine - training| log-prob of a step; steps without fresh responses have none."""
    found = [line[MEAN_ABSOLUTE_DIFFERENCE] for line in lines if MEAN_ABSOLUTE_DIFFERENCE in line]
    assert found
    return max(found)


@pytest.mark.parametrize("stage", ["align", "mpo", "grpo"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stage_runs_and_engine_and_training_agree(tmp_path: Path, stage: str, precision: str):
    recipe = recipe_for(
        tmp_path, tmp_path / "run", (f"model.precision={precision}", "checkpoint.every_steps=0"), stage=stage
    )
    run_stage(recipe)
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == recipe.train.steps
    norms = [line["actor/grad_norm"] for line in lines if "actor/grad_norm" in line]
    assert norms
    assert min(norms) > 0
    if stage == "grpo":
        bound = 1e-4 if precision == "fp32" else 0.05
        assert mismatch(lines) < bound


@needs_te
@pytest.mark.parametrize("fp8", ["none", "tensorwise"])
@pytest.mark.parametrize("stage", ["align", "grpo"])
def test_layers_of_transformer_engine_train_and_generate(needs_cuda, tmp_path: Path, stage: str, fp8: str):
    overrides = ("model.precision=bf16", "model.layers=te", f"model.fp8={fp8}", "checkpoint.every_steps=0")
    run_stage(recipe_for(tmp_path, tmp_path / "run", overrides, stage=stage))
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 3
    if stage == "grpo":
        # The tiny model has two layers, which stay in bf16 under FP8: what is tested is that everything runs padded.
        assert mismatch(lines) < 0.05


def test_generation_with_graphs_in_a_stage(needs_cuda, tmp_path: Path):
    overrides = ("model.precision=bf16", "generation.cuda_graphs=true", "checkpoint.every_steps=0")
    run_stage(recipe_for(tmp_path, tmp_path / "run", overrides))
    lines = read_metrics(tmp_path / "run")
    assert mismatch(lines) < 0.05


def test_the_benchmark_of_slices_runs_with_graphs_and_fp8(needs_cuda):
    """At tiny sizes, so that a mistake shows before the real ones are measured."""
    (found,) = run_ranks(1, measure_tiny, timeout=600)
    assert found["language"]["decode with graphs"]["tokens/s"] > 0
    assert "language in FP8" in found
