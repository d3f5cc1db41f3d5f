"""The HF configuration of the model to plan for: that of a file, or of a known model whose files need not be here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_r1v2.config.validate import download_hint, read_hf_config

_VIT_300M: Mapping[str, object] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "norm_type": "layer_norm",
    "attention_bias": True,
    "use_qk_norm": False,
}
_VIT_6B: Mapping[str, object] = {
    "hidden_size": 3200,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "norm_type": "rms_norm",
    "attention_bias": False,
    "use_qk_norm": True,
}
# Qwen2.5's and, for the 9B, InternLM3's: hidden size, layers, heads, key heads, FFN size.
_INTERNVL3: Mapping[str, tuple[int, int, int, int, int]] = {
    "1b": (896, 24, 14, 2, 4864),
    "2b": (1536, 28, 12, 2, 8960),
    "8b": (3584, 28, 28, 4, 18944),
    "9b": (4096, 48, 32, 2, 10240),
    "14b": (5120, 48, 40, 8, 13824),
    "38b": (5120, 64, 40, 8, 27648),
    "78b": (8192, 80, 64, 8, 29568),
}
_WITH_VIT_6B = ("38b", "78b")


def _whole(vision: Mapping[str, object], text: Mapping[str, object], *, image_token_id: int) -> dict[str, object]:
    """Return the configuration of a whole model in transformers' layout."""
    tower = {"model_type": "internvl_vision", "hidden_act": "gelu", "image_size": [448, 448], "patch_size": [14, 14]}
    return {
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "downsample_ratio": 0.5,
        "image_token_id": image_token_id,
        "tie_word_embeddings": False,
        "vision_config": {**tower, "layer_norm_eps": 1e-6, "use_mean_pooling": True, **vision},
        "text_config": {"hidden_act": "silu", "use_sliding_window": False, **text},
    }


def _internvl3(name: str) -> dict[str, object]:
    hidden, layers, heads, kv_heads, ffn = _INTERNVL3[name]
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "max_position_embeddings": 32768,
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    }
    qwen: dict[str, object] = {"model_type": "qwen2", "vocab_size": 151674, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
    # A family that is planned for, not loaded: transformers has no class for it. Llama has the same parameters.
    # The vocabulary is InternLM3-8B's, without the few image tokens that InternVL3 adds.
    internlm3: dict[str, object] = {
        "model_type": "llama",
        "vocab_size": 128512,
        "rope_theta": 5e7,
        "rms_norm_eps": 1e-5,
    }
    vision = _VIT_6B if name in _WITH_VIT_6B else _VIT_300M
    return _whole(vision, sizes | (internlm3 if name == "9b" else qwen), image_token_id=151667 if name != "9b" else 0)


# InternViT-6B-448px-V2_5, the adapter and QwQ-32B, as checkpoint_tools/reassemble.py writes it.
_R1V2_38B = _whole(
    _VIT_6B,
    {
        "model_type": "qwen2",
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": 27648,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
    },
    image_token_id=151671,
)

KNOWN_MODELS: Mapping[str, Mapping[str, object]] = {
    "r1v2-38b": _R1V2_38B,
    **{f"internvl3-{name}": _internvl3(name) for name in _INTERNVL3},
    "internvl2.5-38b": _internvl3("38b"),
}


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
    if not Path(folder).is_file() and not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"there is no config.json at {'--hf-config' if given else 'model.hf_path'}={folder!r}; give --hf-config: a "
            f"config.json, its folder, or the name of a known model: {', '.join(KNOWN_MODELS)}"
            f"{download_hint(folder)}"
        )
    return read_hf_config(folder)
