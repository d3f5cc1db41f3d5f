"""Folders in the chat layout with every key of the published config.json, and the same model as transformers has it.

Both are written without the table and the translation that they test.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from transformers import InternVLVisionConfig, PretrainedConfig

from tests.checkpoint.chat_reference import write_chat_folder
from tests.tiny_hf import Family, tiny_byte_tokenizer, tiny_text_config, tiny_vision_config

Publisher = Literal["internvl", "skywork"]
Json = dict[str, Any]

LANGUAGE_CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
# InternVL3-1B's config.json, with the sizes that a caller replaces.
_TOP = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {
        "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": "modeling_internvl_chat.InternVLChatModel",
        "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
    },
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 448,
    "hidden_size": 896,
    "image_fold": None,
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
}
_LANGUAGE = {
    "_name_or_path": "./pretrained/Qwen2.5-32B-Instruct",
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "layer_types": ["full_attention", "full_attention"],
    "max_position_embeddings": 32768,
    "max_window_layers": 70,
    "model_type": "qwen2",
    "moe_config": None,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_bfloat16": True,
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": 151674,
}
_VISION = {
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
    "hidden_size": 1024,
    "image_size": 448,
    "initializer_factor": 0.1,
    "initializer_range": 1e-10,
    "intermediate_size": 4096,
    "laux_allreduce": "all_nodes",
    "layer_norm_eps": 1e-06,
    "model_type": "intern_vit_6b",
    "moe_coeff_ratio": 0.5,
    "moe_intermediate_size": 768,
    "moe_output_scale": 4.0,
    "noisy_gate_policy": "RSample_before",
    "norm_type": "layer_norm",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_experts": 8,
    "num_hidden_layers": 24,
    "num_routed_experts": 4,
    "num_shared_experts": 4,
    "patch_size": 14,
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
}
# Where Skywork-R1V2-38B's file says something else.
_SKYWORK_TOP = {
    "architectures": ["SkyworkR1VChatModel"],
    "auto_map": {
        "AutoConfig": "configuration_skywork_chat.SkyworkChatConfig",
        "AutoModel": "modeling_skywork_chat.SkyworkChatModel",
    },
    "model_type": "skywork_chat",
    "template": "skywork-r1v",
}
_SKYWORK_LANGUAGE = {"rope_scaling": None, "rms_norm_eps": 1e-5, "sliding_window": 32768}
_SKYWORK_VISION = {
    "architectures": ["SkyworkVisionModel"],
    "auto_map": {"AutoConfig": "configuration_skywork_vit.SkyworkVisionConfig"},
    "model_type": "skywork_vit",
}
# transformers' names, as it saves them, and those of the chat layout.
_NAMES = (
    (r"^vision_tower\.embeddings\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^vision_tower\.embeddings\.patch_embeddings\.projection", "vision_model.embeddings.patch_embedding"),
    (r"^vision_tower\.embeddings\.position_embeddings$", "vision_model.embeddings.position_embedding"),
    (r"^vision_tower\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.lambda_([12])$", r".ls\1"),
    (r"^multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^multi_modal_projector\.linear_2\.", "mlp1.3."),
)


def write_published_folder(folder: Path, config: Json, source: Path) -> None:
    """Write the model of a folder that transformers saved in the chat layout, under a publisher's config.json."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", "processor_config.json"):
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(chat_tensors(load_file(source / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def write_tiny_published(folder: Path, publisher: Publisher, **language: object) -> Json:
    """Write a random folder under a publisher's config.json and return that; `language` are keys of `llm_config`."""
    family: Family = "6b" if publisher == "skywork" else "300m"
    write_chat_folder(folder, family=family, version="v2")
    text = tiny_text_config()
    text.head_dim = text.hidden_size // text.num_attention_heads
    config = published_config(publisher, tiny_vision_config(family), text)
    config["llm_config"].update(language)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return config


def published_config(publisher: Publisher, vision: InternVLVisionConfig, text: PretrainedConfig) -> Json:
    """Return a publisher's config.json, all of its keys, with the sizes of these parts."""
    skywork = publisher == "skywork"
    config: Json = {**_TOP, **(_SKYWORK_TOP if skywork else {})}
    config |= {"force_image_size": vision.image_size[0], "hidden_size": text.hidden_size}
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config["vision_config"] = {
        **_VISION,
        **(_SKYWORK_VISION if skywork else {}),
        **{name: getattr(vision, name) for name in (*sizes, "norm_type", "layer_norm_eps")},
        "image_size": vision.image_size[0],
        "patch_size": vision.patch_size[0],
        "qkv_bias": vision.attention_bias,
        "qk_normalization": vision.use_qk_norm,
    }
    sizes = (*sizes, "num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps")
    config["llm_config"] = {
        **_LANGUAGE,
        **(_SKYWORK_LANGUAGE if skywork else {}),
        **{name: getattr(text, name) for name in sizes},
        "model_type": text.model_type,
        "architectures": [LANGUAGE_CLASSES[text.model_type]],
        "layer_types": ["full_attention"] * text.num_hidden_layers,
        "eos_token_id": text.eos_token_id,
    }
    if getattr(text, "head_dim", None):
        config["llm_config"]["head_dim"] = text.head_dim
    if text.tie_word_embeddings:
        config["llm_config"]["tie_word_embeddings"] = True
    return json.loads(json.dumps(config))


def chat_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors that transformers saves; query, key and value of the vision tower become one."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("vision_tower.") and re.search(r"attention\.[kv]_proj\.", name):
            continue
        if name.startswith("vision_tower.") and "attention.q_proj." in name:
            tensor = torch.cat([tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            name = name.replace("q_proj", "qkv")
        for pattern, replacement in _NAMES:
            name = name if name.startswith("language_model.") else re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def oracle_config(chat: Json) -> tuple[Json, str] | None:
    """Return transformers' configuration of the same model and its pixel shuffle, as the publishers' classes read it.

    None where they do not load the folder, or where it is no model of transformers' InternVL.
    """
    if chat.get("model_type") not in ("internvl_chat", "skywork_chat"):
        return None
    if "vision_config" not in chat or "llm_config" not in chat:
        return None  # the classes' own sizes, which are not those of the tensors
    defaults = {"hidden_size": 3200, "num_hidden_layers": 48, "num_attention_heads": 25, "intermediate_size": 12800}
    defaults |= {"image_size": 224, "patch_size": 14, "qkv_bias": False, "qk_normalization": True}
    defaults |= {"norm_type": "rms_norm", "layer_norm_eps": 1e-6, "hidden_act": "gelu", "num_channels": 3}
    tower = {**defaults, **chat["vision_config"]}
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "norm_type")
    vision = {name: tower[name] for name in (*names, "layer_norm_eps", "hidden_act", "num_channels")}
    vision |= {"model_type": "internvl_vision", "use_mean_pooling": True}
    vision |= {"attention_bias": tower["qkv_bias"], "use_qk_norm": tower["qk_normalization"]}
    vision |= {name: [tower[name]] * 2 for name in ("image_size", "patch_size")}
    text = {key: value for key, value in chat["llm_config"].items() if key not in ("torch_dtype", "_name_or_path")}
    classes = {name: family for family, name in LANGUAGE_CLASSES.items()}
    text.setdefault("model_type", classes.get((text.get("architectures") or [""])[0]))
    whole = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "vision_config": vision,
        "text_config": text,
        "image_token_id": tiny_byte_tokenizer().convert_tokens_to_ids("<IMG_CONTEXT>"),
        "downsample_ratio": chat.get("downsample_ratio", 0.5),
        # The language model's own configuration ties, in its own class, whose default is false.
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
    }
    return whole, chat.get("ps_version", "v1")


def first_pixel_shuffle(features: torch.Tensor, scale_factor: float = 0.5) -> torch.Tensor:
    """Compute the pixel shuffle of ps_version v1, which ends with rows and columns exchanged.

    Args:
        features: [tiles, side, side, channels].

    Returns:
        [tiles, side * scale, side * scale, channels / scale^2].
    """
    num, side, _, channels = features.shape
    across = round(1 / scale_factor)
    squares = features.reshape(num, side // across, across, side // across, across, channels)
    # [tiles, row, in row, column, in column, channels]: column first, then row, then what is in a square.
    return squares.permute(0, 3, 1, 2, 4, 5).reshape(num, side // across, side // across, across**2 * channels)
