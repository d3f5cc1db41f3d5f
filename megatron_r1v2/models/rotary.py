"""Rotary embeddings with the frequencies of transformers, for kinds that megatron-core lacks or fixes.

megatron-core takes a base and the factor of Llama 3.1. transformers' own functions know every published kind, so the
frequencies are the same in both, to the last bit.
"""

from __future__ import annotations

import math

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_r1v2.models.architecture import LanguageArchitecture


class StretchedRotaryEmbedding(RotaryEmbedding):
    """megatron-core's rotary embedding with other frequencies."""

    def __init__(self, architecture: LanguageArchitecture, plain: RotaryEmbedding) -> None:
        """Build the embedding that replaces a plain one.

        Args:
            plain: the embedding that megatron-core built for the same heads.
        """
        device = plain.inv_freq.device
        super().__init__(
            kv_channels=architecture.head_size,
            rotary_percent=1.0,
            rotary_base=architecture.rope_theta,
            use_cpu_initialization=device.type == "cpu",
            cp_group=plain.cp_group,
        )
        self.inv_freq = rotary_frequencies(architecture)[0].to(device)


def rotary_frequencies(architecture: LanguageArchitecture) -> tuple[torch.Tensor, float]:
    """Compute the angle per position of each pair of channels, and the factor on cosine and sine.

    Returns:
        float32 [head_size / 2], and the attention factor, which is 1 for every kind but `yarn`.
    """
    if architecture.rope_type == "default":
        channels = torch.arange(0, architecture.head_size, 2, dtype=torch.float32)
        return 1.0 / (architecture.rope_theta ** (channels / architecture.head_size)), 1.0
    config = LlamaConfig(
        hidden_size=architecture.head_size * architecture.num_heads,
        num_attention_heads=architecture.num_heads,
        num_key_value_heads=architecture.num_kv_heads,
        head_dim=architecture.head_size,
        max_position_embeddings=architecture.max_positions,
        rope_parameters={
            "rope_type": architecture.rope_type,
            "rope_theta": architecture.rope_theta,
            **dict(architecture.rope_parameters),
        },
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[architecture.rope_type](config, torch.device("cpu"))
    return frequencies.float(), float(factor)


def softmax_scale(architecture: LanguageArchitecture) -> float | None:
    """Return the scale of the attention scores, or None for the usual 1 / sqrt(head size)."""
    _, factor = rotary_frequencies(architecture)
    # transformers multiplies the factor into cosine and sine, so queries and keys both carry it. megatron-core's
    # rotation has no factor; its square in the scale of the scores is the same.
    return None if factor == 1.0 else factor**2 / math.sqrt(architecture.head_size)
