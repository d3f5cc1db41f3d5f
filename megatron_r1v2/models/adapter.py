"""The adapter between vision tower and language model: LayerNorm, Linear, GELU, Linear.

R1V2's best recipe trains this part alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1v2.models.norms import LayerNorm


class Adapter(MegatronModule):
    """Projection of image tokens after pixel shuffle to embeddings of the language model.

    Args:
        config: the vision tower's, without sequence parallelism: images go into the sequence before it is split.
        input_size: K, channels after pixel shuffle.
        output_size: H, hidden size of the language model.
    """

    def __init__(
        self, config: TransformerConfig, *, input_size: int, output_size: int, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        # InternVL leaves the epsilon of this norm at torch's default; its checkpoints state none.
        self.norm = LayerNorm(config, input_size, eps=1e-5)
        self.linear_fc1 = ColumnParallelLinear(
            input_size,
            output_size,
            config=config,
            init_method=config.init_method,
            bias=True,
            gather_output=False,
            tp_group=groups.tp,
        )
        self.linear_fc2 = RowParallelLinear(
            output_size,
            output_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=groups.tp,
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project image tokens, [..., K] to [..., H]."""
        # The second value of a megatron-core linear is a bias that is left to be added; these two add theirs.
        hidden, _ = self.linear_fc1(self.norm(features))
        output: torch.Tensor = self.linear_fc2(F.gelu(hidden))[0]
        return output
