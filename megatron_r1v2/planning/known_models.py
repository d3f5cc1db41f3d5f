"""The HF configuration of the model to plan for: that of a file, or of a known model whose files need not be here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_r1v2.config.validate import read_hf_config

# InternViT-6B-448px-V2_5, the adapter and QwQ-32B in transformers' InternVL layout, as checkpoint_tools/reassemble.py
# writes it: 38,392,158,592 parameters.
_R1V2_38B: dict[str, object] = {
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

KNOWN_MODELS: Mapping[str, Mapping[str, object]] = {"r1v2-38b": _R1V2_38B}


def find_hf_config(hf_path: str, given: str) -> Mapping[str, object]:
    """Return the HF configuration from which the sizes are read.

    Args:
        hf_path: `model.hf_path` of the recipe, for where nothing is given.
        given: a config.json, its folder, the name of a known model, or "".

    Raises:
        ValueError: there is none, or it is not JSON.
    """
    if given in KNOWN_MODELS:
        return KNOWN_MODELS[given]
    folder = given or hf_path
    if Path(folder).is_file():
        try:
            config: dict[str, object] = json.loads(Path(folder).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"--hf-config={folder!r} is not valid JSON ({error}); give a config.json") from error
        return config
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"there is no config.json at {'--hf-config' if given else 'model.hf_path'}={folder!r}; give --hf-config: a "
            f"config.json, its folder, or the name of a known model: {', '.join(KNOWN_MODELS)}"
        )
    return read_hf_config(folder)
