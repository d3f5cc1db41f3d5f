"""Settings of a run as arguments of megatron-core's TransformerConfig."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1v2.config.choices import Fp8, Layers, Precision, Recompute
from megatron_r1v2.config.schema import ModelConfig, ParallelConfig
from megatron_r1v2.models.settings import ComputeSettings

CPU = torch.device("cpu")
SIZES = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4}


def test_the_sections_of_a_recipe_are_collected():
    model = ModelConfig(
        precision=Precision.fp32,
        layers=Layers.te,
        fp8=Fp8.blockwise,
        fp8_weights=True,
        transformer_config={"layernorm_epsilon": 0.25},
    )
    parallel = ParallelConfig(tensor=2, pipeline=4, sequence=True, first_stage_layers=3)
    assert ComputeSettings.from_recipe(model, parallel, Recompute.selective, device=CPU) == ComputeSettings(
        tensor=2,
        pipeline=4,
        sequence=True,
        first_stage_layers=3,
        dtype=torch.float32,
        recompute=Recompute.selective,
        layers=Layers.te,
        fp8=Fp8.blockwise,
        fp8_weights=True,
        language_overrides={"layernorm_epsilon": 0.25},
    )
    assert (
        ComputeSettings.from_recipe(ModelConfig(), ParallelConfig(), Recompute.none, device=CPU).dtype is torch.bfloat16
    )


def test_a_gpu_fuses_what_torch_compiles():
    on_gpu = ComputeSettings.from_recipe(ModelConfig(), ParallelConfig(), Recompute.none, device=torch.device("cuda"))
    assert on_gpu.fused
    assert not ComputeSettings.from_recipe(ModelConfig(), ParallelConfig(), Recompute.none, device=CPU).fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_holds_for_parameters_and_between_stages(dtype):
    config = TransformerConfig(**SIZES, **ComputeSettings(tensor=2, dtype=dtype).shared_arguments())
    assert config.params_dtype is config.pipeline_dtype is dtype
    assert config.bf16 == (dtype is torch.bfloat16)
    assert config.tensor_model_parallel_size == 2


def test_nothing_is_dropped_and_nothing_is_fused():
    config = TransformerConfig(**SIZES, **ComputeSettings().shared_arguments())
    assert config.attention_dropout == config.hidden_dropout == 0
    fused = {name: value for name, value in vars(config).items() if name.endswith("_fusion")}
    assert fused["bias_dropout_fusion"] is fused["gradient_accumulation_fusion"] is fused["apply_rope_fusion"] is False


@pytest.mark.parametrize(
    ("recompute", "granularity", "layers"),
    [(Recompute.none, None, None), (Recompute.selective, "selective", None), (Recompute.full, "full", 1)],
)
def test_recompute_is_of_nothing_of_attention_or_of_every_layer(recompute, granularity, layers):
    config = TransformerConfig(**SIZES, **ComputeSettings(recompute=recompute).shared_arguments())
    assert (config.recompute_granularity, config.recompute_num_layers) == (granularity, layers)


def test_without_fp8_there_are_no_arguments_of_it():
    assert ComputeSettings().fp8_arguments() == {}


@pytest.mark.parametrize(("fp8", "number_format"), [(Fp8.tensorwise, "hybrid"), (Fp8.blockwise, "e4m3")])
def test_fp8_leaves_the_first_and_the_last_layer_in_bf16(fp8, number_format):
    settings = ComputeSettings(dtype=torch.bfloat16, fp8=fp8, fp8_weights=True)
    config = TransformerConfig(**SIZES, **settings.shared_arguments(), **settings.fp8_arguments())
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == (number_format, fp8.value, True)
    assert config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (1, 1)
