"""Norms against torch's, in fp32 and bf16, and their marks for sequence parallelism."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1v2.models.norms import LayerNorm, RMSNorm


def config(**changes) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, **changes)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_norms_are_those_of_torch(eps):
    hidden = torch.randn(5, 2, 8)
    for ours, theirs in (
        (RMSNorm(config(), 8, eps=eps), torch.nn.RMSNorm(8, eps=eps)),
        (LayerNorm(config(), 8, eps=eps), torch.nn.LayerNorm(8, eps=eps)),
    ):
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.normal_()
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(hidden), theirs(hidden), atol=1e-6, rtol=1e-5)


def test_rms_norm_of_bf16_is_computed_in_fp32():
    norm = RMSNorm(config(params_dtype=torch.bfloat16), 8)
    hidden = (torch.randn(500, 8) * 100).bfloat16()
    expected = hidden.float() * (hidden.float().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    got = norm(hidden)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected.bfloat16()), "one rounding, at the end"


@pytest.mark.parametrize("sequence", [False, True])
def test_weights_say_whether_the_sequence_is_split(sequence):
    settings = config(sequence_parallel=sequence, tensor_model_parallel_size=2)
    for norm in (RMSNorm(settings, 8), LayerNorm(settings, 8)):
        assert all(parameter.sequence_parallel is sequence for parameter in norm.parameters())
