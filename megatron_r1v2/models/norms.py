"""Norms in plain torch for the local layers, with and without sequence parallelism.

megatron-core's `WrappedTorchNorm` refuses sequence parallelism.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=parameter_device()))
        mark_sequence_parallel(self.weight, config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise [..., hidden_size]; shape and dtype stay."""
        # In fp32 and rounded before the product, as in transformers: squares of bf16 lose most of their digits.
        mean_square = hidden.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden.float() * torch.rsqrt(mean_square + self.eps)).to(hidden.dtype)


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension, with weight and bias."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=parameter_device()))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=parameter_device()))
        mark_sequence_parallel(self.weight, config)
        mark_sequence_parallel(self.bias, config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise [..., hidden_size]; shape and dtype stay."""
        return F.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps)


def mark_sequence_parallel(parameter: nn.Parameter, config: TransformerConfig) -> None:
    """Mark a parameter for megatron-core, which sums its gradient over the TP ranks under sequence parallelism."""
    # Each rank has the gradient of its part of the sequence only.
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # megatron-core's attribute


def parameter_device() -> torch.device:
    """Return the device on which this process makes parameters."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
