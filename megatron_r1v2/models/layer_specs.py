"""Layer specs: the modules that megatron-core builds its layers from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_r1v2.config.choices import Layers
from megatron_r1v2.models.architecture import FUSED_NORM_NAMES, LanguageArchitecture, VisionArchitecture
from megatron_r1v2.models.attention import PagedSelfAttention, SDPACoreAttention, SharedRowSDPA
from megatron_r1v2.models.linears import ColumnLinear, RowLinear
from megatron_r1v2.models.norms import LayerNorm, RMSNorm
from megatron_r1v2.models.shared_attention import SharedRowAttention
from megatron_r1v2.models.vision_layer import ScaledTransformerLayer, VisionSelfAttention


def language_block_spec(
    architecture: LanguageArchitecture,
    config: TransformerConfig,
    *,
    layers: Layers,
    groups: ProcessGroupCollection,
) -> TransformerBlockSubmodules:
    """Return the specs of the decoder's layers on this pipeline stage, and of its final norm.

    Args:
        groups: process groups; pp decides how many layers this stage has.
    """
    if layers is Layers.te:
        # The import raises RuntimeError on a machine without CUDA, so it must not happen for local layers.
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=architecture.qk_norm), TENorm
        attention = layer.submodules.self_attention
        attention.module = PagedSelfAttention
        # A subclass of TransformerEngine's, made here, since its module cannot be imported without CUDA.
        core_attention = attention.submodules.core_attention
        attention.submodules.core_attention = type("SharedRowTE", (SharedRowAttention, core_attention), {})
    else:
        layer, norm = _local_language_layer(architecture), RMSNorm
    count = get_num_layers_to_build(config, pp_rank=groups.pp.rank())
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


def _local_language_layer(architecture: LanguageArchitecture) -> ModuleSpec:
    head_norm = RMSNorm if architecture.qk_norm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=PagedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnLinear,
                    core_attention=SharedRowSDPA,
                    linear_proj=RowLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_mlp(),
            mlp_bda=get_bias_dropout_add,
            # Checkpoints use TransformerEngine's names, so both implementations load them.
            sharded_state_dict_keys_map=dict(FUSED_NORM_NAMES),
        ),
    )


def vision_block_spec(architecture: VisionArchitecture) -> TransformerBlockSubmodules:
    """Return the specs of an InternViT's layers; it has no final norm."""
    norm = RMSNorm if architecture.norm == "rms_norm" else LayerNorm
    layer = ModuleSpec(
        module=ScaledTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=VisionSelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask, "architecture": architecture},
                # No q_layernorm and k_layernorm, which would norm each head: InternViT norms all heads together, and
                # VisionSelfAttention builds those norms.
                submodules=SelfAttentionSubmodules(
                    linear_qkv=partial(_column_linear, architecture.qkv_bias),
                    core_attention=SDPACoreAttention,
                    linear_proj=RowLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=_mlp(),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * architecture.num_layers, layer_norm=IdentityOp)


def _mlp() -> ModuleSpec:
    return ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear))


def _column_linear(with_bias: bool, *args: object, **kwargs: object) -> torch.nn.Module:
    """Build the qkv projection with or without a bias, whatever the layer's other linears have."""
    # megatron-core gives qkv a bias as soon as any linear has one; the 6B InternViT has biases everywhere else.
    build: Callable[..., torch.nn.Module] = ColumnLinear
    return build(*args, **(kwargs | {"bias": with_bias}))
