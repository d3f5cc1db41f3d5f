"""Layout and numerics that all parts of the model share, as arguments of megatron-core's TransformerConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from megatron_r1v2.config.choices import Fp8, Layers, Precision, Recompute
from megatron_r1v2.config.schema import ModelConfig, ParallelConfig


@dataclass(frozen=True)
class ComputeSettings:
    """The layout and the numerics, independent of an architecture."""

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    first_stage_layers: int = 0
    dtype: torch.dtype = torch.float32
    recompute: Recompute = Recompute.none
    layers: Layers = Layers.local
    fp8: Fp8 = Fp8.none
    fp8_weights: bool = False
    fused: bool = False
    """One kernel each for the language model's SwiGLU and dropout with residual, which needs a GPU."""
    language_overrides: Mapping[str, object] = field(default_factory=dict)
    """Arguments of the language model's TransformerConfig that replace ours."""

    @classmethod
    def from_recipe(
        cls, model: ModelConfig, parallel: ParallelConfig, recompute: Recompute, *, device: torch.device
    ) -> ComputeSettings:
        """Collect the settings from the sections of a recipe, for a device."""
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
            fused=device.type == "cuda",
            language_overrides=dict(model.transformer_config),
        )

    def fp8_arguments(self) -> dict[str, object]:
        """Return the TransformerConfig arguments of FP8, for the language model only."""
        # Not for the vision tower, whose 1,025 tokens a tile do not fit TransformerEngine's shape constraints. Delayed
        # scaling is no choice: its all-reduce of maxima hangs when a rank skips a module, as text-only microbatches do.
        if self.fp8 is Fp8.none:
            return {}
        return {
            "fp8": "hybrid" if self.fp8 is Fp8.tensorwise else "e4m3",
            "fp8_recipe": self.fp8.value,
            "fp8_param": self.fp8_weights,
            # The layers next to embedding and output lose most by rounding.
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": 1,
            "num_layers_at_end_in_bf16": 1,
        }

    def shared_arguments(self) -> dict[str, object]:
        """Return the TransformerConfig arguments that all parts of the model share."""
        bf16 = self.dtype is torch.bfloat16
        arguments: dict[str, object] = {
            "tensor_model_parallel_size": self.tensor,
            "params_dtype": self.dtype,
            "pipeline_dtype": self.dtype,
            "bf16": bf16,
            "deterministic_mode": torch.are_deterministic_algorithms_enabled(),
            # Old log-probs, reference and update must see the same network.
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            # Most fused kernels need CUDA extensions; those that torch compiles are the language model's, see `fused`.
            # megatron-core's fused GELU is an approximation, so the vision tower has none.
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
