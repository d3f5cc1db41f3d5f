"""Norms against torch's, and the norm over all heads split over ranks against the whole one, gradients included."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.models.norms import JointHeadRMSNorm, LayerNorm, RMSNorm
from megatron_r1v2.parallel import groups
from tests.ranks import run_ranks

HEADS, SIZE, EPS = 5, 4, 1e-3


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


def whole_norm(heads_SBND: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Normalise over the channels of all heads."""
    flat = heads_SBND.flatten(2)
    return (weight * flat * (flat.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()).view_as(heads_SBND)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    heads_SBND, direction = torch.randn(2, 6, 2, HEADS, SIZE, generator=generator)
    return heads_SBND, direction, torch.randn(HEADS * SIZE, generator=generator)


def split_norm() -> dict[str, torch.Tensor]:
    """Return output and gradients of this rank's heads: 3 true ones, or 2 and one of padding."""
    context = groups.initialize(ParallelConfig(tensor=2), seed=1)
    local = 3
    mine = slice(context.tensor_rank * local, (context.tensor_rank + 1) * local)
    heads_SBND, direction, weight = inputs()
    padded = [torch.nn.functional.pad(values, (0, 0, 0, 1))[:, :, mine] for values in (heads_SBND, direction)]
    padded_weight = torch.nn.functional.pad(weight, (0, SIZE)).view(-1, SIZE)[mine].flatten()
    norm = JointHeadRMSNorm(
        config(tensor_model_parallel_size=2),
        local_heads=local,
        head_size=SIZE,
        width=HEADS * SIZE,
        eps=EPS,
        tp_group=context.groups.tp,
    )
    with torch.no_grad():
        norm.weight.copy_(padded_weight)
    local_SBND = padded[0].clone().requires_grad_()
    output = norm(local_SBND)
    (output * padded[1]).sum().backward()
    return {
        "output": output.detach(),
        "input gradient": local_SBND.grad,
        "weight gradient": norm.weight.grad.view(1, 1, local, SIZE),
        "is parallel": torch.tensor(norm.weight.tensor_model_parallel),
    }


def test_heads_on_two_ranks_are_normalised_jointly_with_gradients():
    heads_SBND, direction, weight = inputs()
    heads_SBND.requires_grad_()
    weight.requires_grad_()
    expected = whole_norm(heads_SBND, weight)
    (expected * direction).sum().backward()
    ranks = run_ranks(2, split_norm)
    for name, values in (
        ("output", expected.detach()),
        ("input gradient", heads_SBND.grad),
        ("weight gradient", weight.grad.view(1, 1, HEADS, SIZE)),
    ):
        joined = torch.cat([rank[name] for rank in ranks], dim=2)
        torch.testing.assert_close(joined[:, :, :HEADS], values, atol=1e-5, rtol=1e-5, msg=name)
        assert not joined[:, :, HEADS:].any(), f"{name} of a padded head"
    # Else the gradient norm would count one rank's part only.
    assert all(rank["is parallel"] for rank in ranks)
