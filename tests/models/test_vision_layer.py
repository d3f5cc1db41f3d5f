"""The layer of an InternViT: QK norm over all heads split over ranks, layer scales, zero heads in checkpoints."""

from __future__ import annotations

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.models.architecture import VisionArchitecture
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.models.vision import VisionTower, vision_transformer_config
from megatron_r1v2.models.vision_layer import JointHeadRMSNorm
from megatron_r1v2.parallel import groups
from tests.ranks import run_ranks

HEADS, SIZE, EPS = 5, 4, 1e-3
ARCHITECTURE = VisionArchitecture(
    hidden_size=HEADS * SIZE,
    num_layers=1,
    num_heads=HEADS,
    ffn_size=32,
    image_size=8,
    patch_size=4,
    norm="rms_norm",
    norm_epsilon=1e-6,
    qkv_bias=False,
    qk_norm=True,
)


def config(**changes) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, **changes)


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


@pytest.fixture
def layer(context):
    torch.manual_seed(0)
    vision_config = vision_transformer_config(ARCHITECTURE, ComputeSettings())
    return VisionTower(vision_config, ARCHITECTURE, groups=context.groups).decoder.layers[0]


def test_each_branch_is_scaled_before_it_joins_the_residual(layer):
    hidden_PTE = torch.randn(5, 2, HEADS * SIZE)
    with torch.no_grad():
        layer.attention_scale.normal_()
        layer.mlp_scale.normal_()
        output, bias = layer.self_attention(layer.input_layernorm(hidden_PTE), attention_mask=None)
        middle_PTE = hidden_PTE + layer.attention_scale * (output + bias)
        output, bias = layer.mlp(layer.pre_mlp_layernorm(middle_PTE))
        expected_PTE = middle_PTE + layer.mlp_scale * (output + bias)
        got_PTE, _ = layer(hidden_PTE, attention_mask=None)
    torch.testing.assert_close(got_PTE, expected_PTE)


def test_fresh_scales_are_those_of_internvit(layer):
    for scale in (layer.attention_scale, layer.mlp_scale):
        assert torch.equal(scale, torch.full((HEADS * SIZE,), 0.1))


def test_queries_and_keys_are_normed_and_values_are_not(layer):
    hidden_PTE = torch.randn(5, 2, HEADS * SIZE) * 100
    with torch.no_grad():
        query, key, value = layer.self_attention.get_query_key_value_tensors(hidden_PTE)
    for normed in (query, key):
        mean_square = normed.flatten(2).pow(2).mean(-1)
        torch.testing.assert_close(mean_square, torch.ones_like(mean_square), atol=1e-3, rtol=0)
    assert value.flatten(2).pow(2).mean() > 1.5


def test_only_what_carries_heads_loads_into_another_padding(layer):
    sharded = layer.self_attention.sharded_state_dict(prefix="attention.")
    tensors = {key: value for key, value in sharded.items() if isinstance(value, ShardedTensor)}
    flexible = {key for key, value in tensors.items() if value.allow_shape_mismatch}
    assert tensors.keys() - flexible == {"attention.linear_proj.bias"}
    assert {"attention.linear_qkv.weight", "attention.query_norm.weight", "attention.key_norm.weight"} <= flexible
