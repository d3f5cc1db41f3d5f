"""HF configurations of models whose files need not be at hand to plan for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# InternViT-6B-448px-V2_5, the adapter and QwQ-32B in transformers' InternVL layout, as checkpoint_tools/reassemble.py
# writes it: 38,392,158,592 parameters.
_R1V2_38B: dict[str, Any] = {
    "model_type": "internvl",
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "downsample_ratio": 0.5,
    "image_token_id": 151671,
    "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "internvl_vision",
        "hidden_act": "gelu",
        "hidden_size": 3200,
        "num_hidden_layers": 45,
        "num_attention_heads": 25,
        "intermediate_size": 12800,
        "image_size": [448, 448],
        "patch_size": [14, 14],
        "norm_type": "rms_norm",
        "layer_norm_eps": 1e-6,
        "attention_bias": False,
        "use_qk_norm": True,
        "use_mean_pooling": True,
    },
    "text_config": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": 27648,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-5,
        "use_sliding_window": False,
    },
}

KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = {"r1v2-38b": _R1V2_38B}
