"""One layer of an InternViT: megatron-core's TransformerLayer with layer scales and a QK norm over all heads.

25 heads do not divide by the tensor-parallel ranks, so zero heads pad the count (26, 28, 32 for TP 2, 4, 8). Training
keeps a zero head at zero: its output is 0, and so is every gradient of its weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn
from typing_extensions import override

from megatron_r1v2.models.architecture import VisionArchitecture
from megatron_r1v2.models.norms import parameter_device

Offsets = tuple[tuple[int, int, int], ...]
"""(axis, offset, count) of each dimension that megatron-core puts in front of a sharded tensor."""


class JointHeadRMSNorm(nn.Module):
    """RMSNorm of queries or keys over the channels of all heads together, also when TP ranks split the heads.

    The 6B InternViT norms all 25 heads with one statistic.

    Args:
        config: megatron-core's; gives the dtype.
        local_heads: the heads on this rank, padding included.
        width: the channels of all true heads on all ranks: the divisor of the mean.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        local_heads: int,
        head_size: int,
        width: int,
        eps: float,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.tp_group = tp_group
        size = local_heads * head_size
        self.weight = nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=parameter_device()))
        # Without the mark, megatron-core takes the weights for copies and counts one rank's part in the gradient norm.
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, heads_SBND: torch.Tensor) -> torch.Tensor:
        """Collective over `tp_group`: normalise queries or keys, [S, B, local heads, head size]."""
        flat = heads_SBND.flatten(2)
        squares = flat.float().pow(2).sum(-1, keepdim=True)
        # Every rank's output depends on every rank's channels. The reduction sums them forward and the copy backward: a
        # plain all-reduce would lose the other ranks' terms of the gradient. Padded heads add 0.
        squares = copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(squares, group=self.tp_group), group=self.tp_group
        )
        normed = flat.float() * torch.rsqrt(squares / self.width + self.eps)
        return (self.weight * normed.to(flat.dtype)).view_as(heads_SBND)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Offsets = (), **_: object) -> ShardedStateDict:
        """Return the weight as a shard over the heads, for `dist_checkpointing`."""
        return _allow_padding(
            make_sharded_tensors_for_checkpoint(
                self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
            )
        )


class VisionSelfAttention(SelfAttention):
    """Bidirectional attention whose head count may be padded with zero heads to divide by the TP ranks."""

    @override
    def __init__(self, *args: object, architecture: VisionArchitecture, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        # Not named q_layernorm and k_layernorm: if the language model has a QK norm, megatron-core sums the gradients
        # of all parameters with these names over the TP ranks. That is wrong here: each rank has its own heads.
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        if architecture.qk_norm:
            self.query_norm = self._joint_norm(architecture)
            self.key_norm = self._joint_norm(architecture)

    def _joint_norm(self, architecture: VisionArchitecture) -> JointHeadRMSNorm:
        return JointHeadRMSNorm(
            self.config,
            local_heads=self.num_attention_heads_per_partition,
            head_size=architecture.head_size,
            width=architecture.hidden_size,
            # transformers leaves the epsilon of these two at its default, whatever the other norms use.
            eps=1e-6,
            tp_group=self.pg_collection.tp,
        )

    @override
    def get_query_key_value_tensors(
        self, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project to queries, keys and values, and normalise queries and keys over all heads."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value

    @override
    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, object] | None = None
    ) -> ShardedStateDict:
        """Return the parameters for `dist_checkpointing`; those with zero heads may load into another padding."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        # The bias of the output has no heads: a wrong size of it is an error.
        unpadded = f"{prefix}linear_proj.bias"
        _allow_padding({key: value for key, value in sharded.items() if key != unpadded})
        return sharded


class ScaledTransformerLayer(TransformerLayer):
    """x + attention_scale * attention(norm(x)), then x + mlp_scale * mlp(norm(x))."""

    @override
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        like = self.self_attention.linear_proj.weight
        size = self.config.hidden_size
        self.attention_scale = nn.Parameter(torch.full((size,), 0.1, dtype=like.dtype, device=like.device))
        self.mlp_scale = nn.Parameter(torch.full((size,), 0.1, dtype=like.dtype, device=like.device))
        # megatron-core has no layer scale, but adds bias and residual through these two attributes.
        self.self_attn_bda = self._attention_residual
        self.mlp_bda = self._mlp_residual

    def _attention_residual(self, *_: object) -> Callable[..., torch.Tensor]:
        return lambda output, residual, _dropout: _add_scaled(output, residual, self.attention_scale)

    def _mlp_residual(self, *_: object) -> Callable[..., torch.Tensor]:
        return lambda output, residual, _dropout: _add_scaled(output, residual, self.mlp_scale)


def _allow_padding(sharded: ShardedStateDict) -> ShardedStateDict:
    """Let tensors load into a layout with another number of zero heads; change the tensors and return them."""
    for value in sharded.values():
        if isinstance(value, ShardedTensor):
            value.allow_shape_mismatch = True
    return sharded


def _add_scaled(
    output: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    hidden, bias = output
    if bias is not None:
        hidden = hidden + bias
    return residual + scale * hidden
