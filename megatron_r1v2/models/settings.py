"""What every part of the model shares when it is translated to megatron-core's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_r1v2.config.schema import Fp8, Layers, ModelConfig, ParallelConfig, Precision, Recompute


@dataclass(frozen=True)
class ComputeSettings:
    """The layout and the numerics, apart from any architecture."""

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    first_stage_layers: int = 0
    dtype: torch.dtype = torch.float32
    recompute: Recompute = Recompute.none
    layers: Layers = Layers.local
    fp8: Fp8 = Fp8.none
    fp8_weights: bool = False
    language_overrides: Mapping[str, Any] = field(default_factory=dict)
    """Passed to the language model's TransformerConfig as they stand."""

    @classmethod
    def from_recipe(cls, model: ModelConfig, parallel: ParallelConfig, recompute: Recompute) -> ComputeSettings:
        """Collect the settings of a run."""
        return cls(
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            sequence=parallel.sequence,
            first_stage_layers=parallel.first_stage_layers,
            dtype=torch.bfloat16 if model.precision is Precision.bf16 else torch.float32,
            recompute=recompute,
            layers=model.layers,
            fp8=model.fp8,
            fp8_weights=model.fp8_weights,
            language_overrides=dict(model.transformer_config),
        )

    def fp8_arguments(self) -> dict[str, Any]:
        """Return the TransformerConfig arguments of FP8, which only the language model gets.

        The vision tower's 1,025 tokens a tile do not meet TransformerEngine's shape constraints. Delayed scaling is not
        offered: its all-reduce of maxima hangs when a rank skips a module, as a text-only microbatch does.
        """
        if self.fp8 is Fp8.none:
            return {}
        return {
            "fp8": "hybrid" if self.fp8 is Fp8.tensorwise else "e4m3",
            "fp8_recipe": self.fp8.value,
            "fp8_param": self.fp8_weights,
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": 1,
            "num_layers_at_end_in_bf16": 1,
        }

    def shared(self) -> dict[str, Any]:
        """Return the TransformerConfig arguments that do not depend on the part of the model."""
        bf16 = self.dtype is torch.bfloat16
        arguments: dict[str, Any] = {
            "tensor_model_parallel_size": self.tensor,
            "params_dtype": self.dtype,
            "pipeline_dtype": self.dtype,
            "bf16": bf16,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            # The fused kernels need CUDA extensions that a CPU has not; they change no result.
            "masked_softmax_fusion": False,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "apply_rope_fusion": False,
            "gradient_accumulation_fusion": False,
            "persist_layer_norm": False,
        }
        if self.recompute is Recompute.full:
            arguments |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        elif self.recompute is Recompute.selective:
            arguments |= {"recompute_granularity": "selective"}
        return arguments
