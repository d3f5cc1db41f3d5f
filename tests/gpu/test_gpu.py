"""The same model, steps and stages on one GPU; two ranks share it over gloo, since NCCL refuses two on a device.

The stages' own code decides for the GPU where there is one, so these tests call what the CPU tests call.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from megatron_r1v2.config.schema import ParallelConfig
from tests.distributed.steps import Material, Outcome, make_material, run_step
from tests.distributed.test_step import ALONE, TOGETHER, difference, trained_gradients
from tests.ranks import run_ranks
from tests.tiny_hf import tiny_hf_model, tiny_vision_config
from tests.training.runs import read_metrics, recipe_for, run_stage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

HAS_TE = importlib.util.find_spec("transformer_engine") is not None
# fp32 products of a GPU are summed in another order, and torch keeps TF32 off for them.
FP32 = 1e-4


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> tuple[str, Material]:
    """A 6B-family model with 5 heads, and what transformers' autograd on the CPU gives for a step."""
    folder = tmp_path_factory.mktemp("gpu") / "model"
    model = tiny_hf_model(folder, "6b", vision=tiny_vision_config("6b", heads=5))
    return str(folder), make_material(model)


def step(folder: str, material: Material, parallel: dict, split: list) -> Outcome:
    outcome = run_step(folder, material, ParallelConfig(**parallel), split)
    outcome.gradients.update({name: gradient.cpu() for name, gradient in outcome.gradients.items()})
    outcome.log_probs.update({name: values.cpu() for name, values in outcome.log_probs.items()})
    return outcome


def check(outcome: Outcome, material: Material) -> None:
    expected = trained_gradients(material, ("vision", "adapter", "language"))
    for name, gradient in expected.items():
        if not name.endswith("k_proj.bias"):
            assert difference(outcome.gradients[name], gradient) < FP32, name
    assert outcome.metrics["actor/loss"] == pytest.approx(material.loss, rel=FP32)
    for sample, log_probs in outcome.log_probs.items():
        assert difference(log_probs, material.log_probs[sample]) < FP32


def test_a_step_gives_the_gradients_of_the_cpu(material):
    folder, expected = material
    (outcome,) = run_ranks(1, step, folder, expected, {}, TOGETHER)
    check(outcome, expected)


@pytest.mark.parametrize("parallel", [{"tensor": 2, "sequence": True}, {"pipeline": 2}], ids=["SP2", "PP2"])
def test_two_ranks_on_one_gpu_give_the_gradients_of_the_cpu(material, parallel):
    folder, expected = material
    outcome = run_ranks(2, step, folder, expected, parallel, ALONE)[0]
    check(outcome, expected)


@pytest.mark.parametrize("stage", ["align", "grpo"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stage_runs_and_engine_and_training_agree(tmp_path: Path, stage: str, precision: str):
    recipe = recipe_for(tmp_path, tmp_path / "run", (f"model.precision={precision}", "checkpoint.every_steps=0"))
    run_stage(recipe, stage)
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == recipe.train.steps
    assert all(line["actor/grad_norm"] > 0 for line in lines if "actor/grad_norm" in line)
    if stage == "grpo":
        # bf16 keeps 8 bits: log-probs of about -3 are good to some hundredths.
        bound = 1e-4 if precision == "fp32" else 0.05
        differences = [line["rollout_corr/log_prob_abs_diff"] for line in lines if "actor/loss" in line]
        assert differences
        assert max(differences) < bound


@pytest.mark.skipif(not HAS_TE, reason="TransformerEngine is not installed")
@pytest.mark.parametrize("fp8", ["none", "tensorwise"])
def test_transformer_engine_layers_train_and_generate(tmp_path: Path, fp8: str):
    local = recipe_for(tmp_path, tmp_path / "local", ("model.precision=bf16", "checkpoint.every_steps=0"))
    run_stage(local)
    te = recipe_for(
        tmp_path,
        tmp_path / "te",
        ("model.precision=bf16", "model.layers=te", f"model.fp8={fp8}", "checkpoint.every_steps=0"),
    )
    run_stage(te)
    losses = [
        [line["actor/loss"] for line in read_metrics(tmp_path / name) if "actor/loss" in line]
        for name in ("local", "te")
    ]
    assert losses[0]
    assert losses[1]
    # Sampled tokens may part ways after a step; the first loss is 0 up to rounding with any implementation.
    assert losses[0][0] == pytest.approx(losses[1][0], abs=0.05)
