"""Folders as their publishers write them: every key of the published config.json, sizes shrunk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from megatron_r1v2.resilience.files import write_json
from tests.checkpoint.chat_reference import write_chat_folder

# OpenGVLab/InternVL3-1B.
_INTERNVL3: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {
        "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": "modeling_internvl_chat.InternVLChatModel",
        "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
    },
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 32,
    "hidden_size": 96,
    "image_fold": None,
    "llm_config": {
        "_name_or_path": "./pretrained/Qwen2.5-32B-Instruct",
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 96,
        "initializer_range": 0.02,
        "intermediate_size": 192,
        "layer_types": ["full_attention", "full_attention"],
        "max_position_embeddings": 32768,
        "max_window_layers": 70,
        "model_type": "qwen2",
        "moe_config": None,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_bfloat16": True,
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": 300,
    },
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "model_type": "internvl_chat",
    "output_attentions": False,
    "pad2square": False,
    "ps_version": "v2",
    "select_layer": -1,
    "system_message": None,
    "template": "internvl2_5",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": None,
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "use_thumbnail": True,
    "vision_config": {
        "_name_or_path": "OpenGVLab/InternViT-6B-448px-V1-5",
        "architectures": ["InternVisionModel"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_intern_vit.InternVisionConfig",
            "AutoModel": "modeling_intern_vit.InternVisionModel",
        },
        "capacity_factor": 1.2,
        "drop_path_rate": 0.1,
        "dropout": 0.0,
        "eval_capacity_factor": 1.4,
        "hidden_act": "gelu",
        "hidden_size": 64,
        "image_size": 32,
        "initializer_factor": 0.1,
        "initializer_range": 1e-10,
        "intermediate_size": 128,
        "laux_allreduce": "all_nodes",
        "layer_norm_eps": 1e-06,
        "model_type": "intern_vit_6b",
        "moe_coeff_ratio": 0.5,
        "moe_intermediate_size": 768,
        "moe_output_scale": 4.0,
        "noisy_gate_policy": "RSample_before",
        "norm_type": "layer_norm",
        "num_attention_heads": 4,
        "num_channels": 3,
        "num_experts": 8,
        "num_hidden_layers": 2,
        "num_routed_experts": 4,
        "num_shared_experts": 4,
        "patch_size": 4,
        "qk_normalization": False,
        "qkv_bias": True,
        "shared_expert_intermediate_size": 3072,
        "torch_dtype": "bfloat16",
        "use_bfloat16": True,
        "use_flash_attn": False,
        "use_moe": False,
        "use_residual": True,
        "use_rts": False,
        "use_weighted_residual": False,
    },
}


def write_internvl3(folder: Path, **llm: object) -> dict[str, Any]:
    """Write an InternVL3 and return its config.json; `llm` are keys of `llm_config` with other values."""
    write_chat_folder(folder, family="300m", version="v2")
    config = copy.deepcopy(_INTERNVL3)
    config["llm_config"].update(llm)
    write_json(folder / "config.json", config)
    return config


def write_skywork(folder: Path) -> dict[str, Any]:
    """Write a Skywork R1V2 and return its config.json."""
    write_chat_folder(folder, family="6b", version="v2")
    config = copy.deepcopy(_INTERNVL3)
    config |= {"architectures": ["SkyworkR1VChatModel"], "model_type": "skywork_chat"}
    config["auto_map"] = {
        "AutoConfig": "configuration_skywork_chat.SkyworkChatConfig",
        "AutoModel": "modeling_skywork_chat.SkyworkChatModel",
    }
    config["llm_config"].update(rope_scaling=None, rms_norm_eps=1e-5, sliding_window=32768)
    vision = {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}
    config["vision_config"].update(
        model_type="skywork_vit",
        architectures=["SkyworkVisionModel"],
        auto_map={"AutoConfig": "configuration_skywork_vit.SkyworkVisionConfig"},
        **vision,
    )
    write_json(folder / "config.json", config)
    return config
