"""A step on the GPU beside the step of transformers on the CPU: fp32 to rounding, bf16 and FP8 within their noise."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from megatron_r1v2.config.schema import Fp8, Layers, Packing
from megatron_r1v2.models.sdpa import attend
from megatron_r1v2.models.shared_attention import check_shared_attention
from tests.distributed.test_step import ALONE, SHARED, TOGETHER, UNEQUAL, difference
from tests.gpu.on_device import errors, steps_around_a_rollout, take_step, transformers_in_bf16
from tests.ranks import run_ranks

HAS_TE = importlib.util.find_spec("transformer_engine") is not None
BF16 = {"dtype": torch.bfloat16}
TE = BF16 | {"layers": Layers.te}
FP8 = TE | {"fp8": Fp8.tensorwise}
# fp32 products of a GPU are summed in another order.
FP32 = 1e-4
LAYOUTS = {
    "one rank": ({}, TOGETHER),
    # NCCL refuses two ranks on one device: those that share the GPU talk through the host (parallel/host_staged.py).
    "TP2": ({"tensor": 2}, ALONE),
    "SP2": ({"tensor": 2, "sequence": True}, TOGETHER),
    "DP2": ({}, UNEQUAL),
    "PP2": ({"pipeline": 2}, TOGETHER),
}
needs_te = pytest.mark.skipif(not HAS_TE, reason="TransformerEngine is not installed")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_in_fp32_is_that_of_the_cpu(name, inputs):
    folder, exact = inputs
    parallel, split = LAYOUTS[name]
    ranks = 1 if name == "one rank" else 2
    outcomes = run_ranks(ranks, take_step, folder, exact, parallel, split, {}, timeout=600)
    main = outcomes[0]
    assert main.metrics["actor/loss"] == pytest.approx(exact.loss, rel=FP32)
    assert main.gradients.keys() == exact.gradients.keys()
    assert [n for n, gradient in exact.gradients.items() if not difference(main.gradients[n], gradient) < FP32] == []
    scored = {}
    for outcome in outcomes:
        assert outcome.out_of_step == []
        assert outcome.largest_padding == 0.0
        scored |= outcome.logits
        for sample, log_probs in outcome.log_probs.items():
            assert difference(log_probs, exact.log_probs[sample]) < FP32
    assert scored.keys() == exact.samples.keys()
    for sample, logits_SV in scored.items():
        expected_SV = exact.logits[sample]
        assert difference(logits_SV[:, : expected_SV.shape[1]], expected_SV) < FP32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention_in_shared_rows_is_that_of_separate_ones(dtype, kv_heads):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_shared_attention(heads=4, kv_heads=kv_heads, head_size=64, device=device, dtype=dtype)


def test_shared_rows_in_fp32_give_the_step_of_the_cpu(inputs):
    folder, exact = inputs
    (outcome,) = run_ranks(1, take_step, folder, exact, {}, SHARED, {}, Packing.shared, timeout=600)
    assert outcome.metrics["actor/loss"] == pytest.approx(exact.loss, rel=FP32)
    wrong = [n for n, gradient in exact.gradients.items() if not difference(outcome.gradients[n], gradient) < FP32]
    assert wrong == []


def test_shared_rows_in_bf16_are_within_the_noise_of_bf16(inputs, noise):
    (outcome,) = run_ranks(1, take_step, *inputs, {}, SHARED, BF16, Packing.shared, timeout=600)
    found = errors(outcome, inputs[1])
    assert {name: found[name] / noise[name] for name in noise if found[name] > 2 * noise[name]} == {}


def test_fused_kernels_in_fp32_give_the_step_of_the_cpu(needs_cuda, inputs):
    folder, exact = inputs
    (outcome,) = run_ranks(1, take_step, folder, exact, {}, TOGETHER, {"fused": True}, timeout=600)
    assert outcome.metrics["actor/loss"] == pytest.approx(exact.loss, rel=FP32)
    wrong = [n for n, gradient in exact.gradients.items() if not difference(outcome.gradients[n], gradient) < FP32]
    assert wrong == []


def test_fused_kernels_in_bf16_are_within_the_noise_of_bf16(needs_cuda, inputs, noise):
    (outcome,) = run_ranks(1, take_step, *inputs, {}, TOGETHER, BF16 | {"fused": True}, timeout=600)
    found = errors(outcome, inputs[1])
    assert {name: found[name] / noise[name] for name in noise if found[name] > 2 * noise[name]} == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_mask", [False, True])
def test_the_chosen_attention_kernel_takes_groups_of_heads(needs_cuda, dtype, has_mask):
    query, key, value = (torch.randn(2, heads, 37, 64) for heads in (8, 2, 2))
    mask = torch.ones(37, 37, dtype=torch.bool).tril() if has_mask else None
    expected = attend(query, key, value, scale=None, is_causal=not has_mask, mask=mask)
    on_gpu = [tensor.to("cuda", dtype).requires_grad_() for tensor in (query, key, value)]
    mask = None if mask is None else mask.cuda()
    found = attend(*on_gpu, scale=None, is_causal=not has_mask, mask=mask)
    assert ("Flash" if dtype is torch.bfloat16 and not has_mask else "Efficient") in type(found.grad_fn).__name__
    bound = 1e-4 if dtype is torch.float32 else 4e-2
    torch.testing.assert_close(found.detach().float().cpu(), expected, atol=bound, rtol=bound)


@pytest.fixture(scope="module")
def noise(inputs) -> dict[str, float]:
    """Return the distance of bf16 from fp32 on the CPU, in transformers."""
    return errors(transformers_in_bf16(*inputs), inputs[1])


def error_of(inputs, compute) -> dict[str, float]:
    (outcome,) = run_ranks(1, take_step, *inputs, {}, TOGETHER, compute, timeout=600)
    return errors(outcome, inputs[1])


def test_a_step_in_bf16_is_within_the_noise_of_bf16(inputs, noise):
    found = error_of(inputs, BF16)
    assert {name: found[name] / noise[name] for name in noise if found[name] > 2 * noise[name]} == {}
    assert found["log-probs"] > noise["log-probs"] / 20, "bf16 was not on"


@needs_te
def test_layers_of_transformer_engine_are_within_the_noise_of_bf16(needs_cuda, inputs, noise):
    found = error_of(inputs, TE)
    assert {name: found[name] / noise[name] for name in noise if found[name] > 2 * noise[name]} == {}


@needs_te
def test_fp8_is_as_far_off_as_its_three_bits(needs_cuda, inputs, noise):
    """Two of four layers multiply in 8 bits: e4m3 keeps 3 bits of a mantissa, bf16 keeps 7, a factor of 16."""
    found = error_of(inputs, FP8)
    assert found["log-probs"] > 2 * noise["log-probs"], "FP8 was not on"
    assert {name: found[name] / noise[name] for name in noise if found[name] > 32 * noise[name]} == {}


@pytest.mark.parametrize(
    "compute",
    [
        pytest.param({}, id="fp32"),
        pytest.param(BF16, id="bf16"),
        pytest.param(FP8, id="FP8", marks=needs_te),
        pytest.param(FP8 | {"fp8_weights": True}, id="FP8 weights", marks=needs_te),
    ],
)
def test_a_step_is_the_same_before_and_after_a_rollout(compute, inputs):
    """Memory included: 100 MB of key-value cache would be seen, had they stayed; 64 MiB are a stream's workspace."""
    (steps,) = run_ranks(1, steps_around_a_rollout, *inputs, compute, timeout=600)
    before, after = steps[1], steps[2]
    for name, value in before.items():
        if "bytes" not in name:
            assert after[name] == pytest.approx(value, rel=1e-5, abs=1e-8), name
    assert after["bytes held"] - before["bytes held"] <= 64 * 2**20
    assert after["peak bytes"] == pytest.approx(before["peak bytes"], rel=0.01)
    assert steps[3]["bytes held"] == after["bytes held"], "a second step keeps no more than the first"
