"""Norms in plain torch that know tensor and sequence parallelism.

megatron-core's `WrappedTorchNorm` refuses sequence parallelism, so the local layer specs use these.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from megatron_r1v2.models.sharding import allow_padding


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), the normalisation in fp32 and the product in the dtype of x."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=_device()))
        mark_sequence_parallel(self.weight, config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension.

        Args:
            hidden: [..., hidden_size].

        Returns:
            The same shape and dtype.
        """
        mean_square = hidden.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden.float() * torch.rsqrt(mean_square + self.eps)).to(hidden.dtype)


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension, with weight and bias."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=_device()))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=_device()))
        mark_sequence_parallel(self.weight, config)
        mark_sequence_parallel(self.bias, config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension.

        Args:
            hidden: [..., hidden_size].

        Returns:
            The same shape and dtype.
        """
        return F.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps)


class JointHeadRMSNorm(nn.Module):
    """RMSNorm of queries or keys over the channels of all heads jointly, the heads split over tensor-parallel ranks.

    The 6B InternViT normalises all 25 heads with one statistic. Zero heads that pad the count to a multiple of the
    ranks add nothing to the sum of squares, so dividing by the true width gives the unpadded result.
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
        """Build the norm of this rank's heads.

        Args:
            config: gives the dtype.
            local_heads: heads on this rank, padding included.
            head_size: channels of a head.
            width: channels of all true heads, over all ranks: the divisor of the mean.
            eps: added to the mean square.
            tp_group: ranks that hold the other heads.
        """
        super().__init__()
        self.width = width
        self.eps = eps
        self.tp_group = tp_group
        shape = local_heads * head_size
        self.weight = nn.Parameter(torch.ones(shape, dtype=config.params_dtype, device=_device()))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, heads_SBND: torch.Tensor) -> torch.Tensor:
        """Normalise queries or keys.

        Args:
            heads_SBND: [S, B, local heads, head size].

        Returns:
            The same shape and dtype.
        """
        flat = heads_SBND.flatten(2)
        squares = flat.float().pow(2).sum(-1, keepdim=True)
        # Every rank's output depends on every rank's channels: summed forward and, by the copy, backward too.
        squares = copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(squares, group=self.tp_group), group=self.tp_group
        )
        normed = flat.float() * torch.rsqrt(squares / self.width + self.eps)
        return (self.weight * normed.to(flat.dtype)).view_as(heads_SBND)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Return the weight as a shard over the heads, for `dist_checkpointing`."""
        return allow_padding(
            make_sharded_tensors_for_checkpoint(
                self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
            )
        )


def mark_sequence_parallel(parameter: nn.Parameter, config: TransformerConfig) -> None:
    """Tell megatron-core to sum this parameter's gradient over TP ranks, each of which sees a part of the sequence."""
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
