"""The shape of every parameter of a model, whole, as transformers' own classes have it.

In words of our own: transformers takes two seconds to import the classes, a fifth of what a model of 10 GB takes to be
converted. The test of this file's name compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_r1v2.models.architecture import LanguageArchitecture, R1V2Architecture, VisionArchitecture


def parameter_shapes(architecture: R1V2Architecture) -> Mapping[str, torch.Size]:
    """Return the shape of each of our parameters, whole, by our name."""
    vision, language = architecture.vision, architecture.language
    channels, hidden = architecture.adapter_input_size, language.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "vision.class_token": (1, 1, vision.hidden_size),
        "vision.patch_embedding.weight": (vision.hidden_size, 3, vision.patch_size, vision.patch_size),
        "vision.patch_embedding.bias": (vision.hidden_size,),
        "vision.position_embeddings": (1, vision.num_patches + 1, vision.hidden_size),
        "adapter.norm.weight": (channels,),
        "adapter.norm.bias": (channels,),
        "adapter.linear_fc1.weight": (hidden, channels),
        "adapter.linear_fc1.bias": (hidden,),
        "adapter.linear_fc2.weight": (hidden, hidden),
        "adapter.linear_fc2.bias": (hidden,),
        "language.embedding.word_embeddings.weight": (language.vocab_size, hidden),
        "language.decoder.final_layernorm.weight": (hidden,),
        "language.output_layer.weight": (language.vocab_size, hidden),
    }
    layers = {
        "vision": (vision.num_layers, _vision_layer(vision)),
        "language": (language.num_layers, _language_layer(language)),
    }
    for part, (count, layer) in layers.items():
        shapes |= {f"{part}.decoder.layers.{n}.{name}": shape for n in range(count) for name, shape in layer.items()}
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def _vision_layer(vision: VisionArchitecture) -> Mapping[str, tuple[int, ...]]:
    hidden, ffn = vision.hidden_size, vision.ffn_size
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attention.linear_qkv.weight": (3 * hidden, hidden),
        "self_attention.linear_proj.weight": (hidden, hidden),
        "self_attention.linear_proj.bias": (hidden,),
        "attention_scale": (hidden,),
        "pre_mlp_layernorm.weight": (hidden,),
        "mlp.linear_fc1.weight": (ffn, hidden),
        "mlp.linear_fc1.bias": (ffn,),
        "mlp.linear_fc2.weight": (hidden, ffn),
        "mlp.linear_fc2.bias": (hidden,),
        "mlp_scale": (hidden,),
    }
    if vision.norm == "layer_norm":
        layer |= {"input_layernorm.bias": (hidden,), "pre_mlp_layernorm.bias": (hidden,)}
    if vision.qkv_bias:
        layer["self_attention.linear_qkv.bias"] = (3 * hidden,)
    if vision.qk_norm:
        layer |= {"self_attention.query_norm.weight": (hidden,), "self_attention.key_norm.weight": (hidden,)}
    return layer


def _language_layer(language: LanguageArchitecture) -> Mapping[str, tuple[int, ...]]:
    hidden, head = language.hidden_size, language.head_size
    joined = (language.num_heads + 2 * language.num_kv_heads) * head
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attention.linear_qkv.weight": (joined, hidden),
        "self_attention.linear_proj.weight": (hidden, language.num_heads * head),
        "pre_mlp_layernorm.weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * language.ffn_size, hidden),
        "mlp.linear_fc2.weight": (hidden, language.ffn_size),
    }
    if language.qkv_bias:
        layer["self_attention.linear_qkv.bias"] = (joined,)
    if language.qk_norm:
        layer |= {"self_attention.q_layernorm.weight": (head,), "self_attention.k_layernorm.weight": (head,)}
    return layer
