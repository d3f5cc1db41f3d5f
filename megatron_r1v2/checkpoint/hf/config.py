"""The config.json of both Hugging Face layouts, each made from the other; no remote code is run for either.

Everything else in the package reads the one of transformers (`model_type: internvl`). The chat layout
(`model_type: internvl_chat`) is what OpenGVLab and Skywork publish, and what vLLM's InternVLChatModel and
SkyworkR1VChatModel read: `vision_config`, `llm_config` with its `architectures`, `select_layer`, `force_image_size`,
`downsample_ratio`, `ps_version`, `min_dynamic_patch`, `max_dynamic_patch`, `dynamic_image_size` and `use_thumbnail`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_r1v2.checkpoint.hf.folders import JsonObject, read_json
from megatron_r1v2.checkpoint.hf.mapping import Layout
from megatron_r1v2.models.architecture import R1V2Architecture, r1v2_architecture, with_pixel_statistics

IMAGE_TOKEN = "<IMG_CONTEXT>"
# What belongs to a component's own file and not into a part of another configuration.
NOT_IN_PARTS = ("transformers_version", "torch_dtype", "dtype", "auto_map", "_name_or_path")
# vision_config: transformers' name and that of the chat layout.
_VISION_KEYS: Mapping[str, str] = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "num_channels": "num_channels",
    "hidden_act": "hidden_act",
    "norm_type": "norm_type",
    "layer_norm_eps": "layer_norm_eps",
    "attention_bias": "qkv_bias",
    "use_qk_norm": "qk_normalization",
    "attention_dropout": "attention_dropout",
    "initializer_range": "initializer_range",
}
_LANGUAGE_CLASSES: Mapping[str, str] = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
_DEFAULT_MAX_TILES = 12


def layout_of(config: JsonObject) -> Layout:
    """Return which layout a config.json belongs to.

    Raises:
        ValueError: to neither.
    """
    model_type = config.get("model_type")
    if model_type == "internvl":
        return "transformers"
    if model_type == "internvl_chat":
        return "chat"
    raise ValueError(
        f"config.json has model_type={model_type!r}, which is no InternVL; accepted: 'internvl' (transformers' layout) "
        "and 'internvl_chat' (OpenGVLab's and Skywork's); a language model or a vision tower alone is for reassemble"
    )


def folder_layout(folder: Path) -> Layout:
    """Return the layout of a folder's config.json."""
    return layout_of(read_json(folder / "config.json"))


def read_hf_config(folder: Path | str) -> tuple[JsonObject, Layout]:
    """Read config.json of a folder in either layout.

    Args:
        folder: a whole model.

    Returns:
        The configuration as transformers' InternVL has it, with `ps_version` where it is not v2; and the layout.

    Raises:
        ValueError: it is missing, or configures something that the model does not compute.
    """
    config = read_json(Path(folder) / "config.json")
    layout = layout_of(config)
    if layout == "chat":
        config = transformers_config(config, image_token_id=image_token_id(folder))
    return config, layout


def read_hf_architecture(folder: Path | str) -> tuple[R1V2Architecture, Layout]:
    """Read the sizes of the model in a folder of either layout, with the pixel statistics of its image processor."""
    config, layout = read_hf_config(folder)
    return with_pixel_statistics(r1v2_architecture(config), folder), layout


def stated_processor(folder: Path | str) -> JsonObject:
    """Return preprocessor_config.json of a folder; empty when there is none."""
    path = Path(folder) / "preprocessor_config.json"
    return read_json(path) if path.is_file() else {}


def image_token_id(folder: Path | str) -> int:
    """Look `<IMG_CONTEXT>` up in the tokenizer files, which the chat layout's config.json leaves it to.

    Raises:
        ValueError: no file of the tokenizer has it.
    """
    folder = Path(folder)
    if (folder / "added_tokens.json").is_file():
        added = read_json(folder / "added_tokens.json")
        if IMAGE_TOKEN in added:
            return int(added[IMAGE_TOKEN])
    if (folder / "tokenizer_config.json").is_file():
        decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
        for token_id, token in decoder.items():
            if token.get("content") == IMAGE_TOKEN:
                return int(token_id)
    if (folder / "tokenizer.json").is_file():
        for token in read_json(folder / "tokenizer.json").get("added_tokens") or []:
            if token.get("content") == IMAGE_TOKEN:
                return int(token["id"])
    raise ValueError(
        f"{folder}: no tokenizer file (added_tokens.json, tokenizer_config.json, tokenizer.json) has {IMAGE_TOKEN}, "
        "whose id the chat layout leaves to the tokenizer; copy the tokenizer's files into the folder"
    )


def transformers_vision_config(chat: JsonObject) -> JsonObject:
    """Translate the vision_config of the chat layout, or the config.json of a published InternViT."""
    if chat.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"vision_config.hidden_act={chat['hidden_act']!r} is not supported; accepted: 'gelu'")
    vision = {ours: chat[theirs] for ours, theirs in _VISION_KEYS.items() if theirs in chat}
    for key in ("hidden_size", "num_hidden_layers", "image_size", "patch_size"):
        if type(chat.get(key)) is not int or chat[key] < 1:
            raise ValueError(f"vision_config has {key}={chat.get(key)!r}, no InternViT's; accepted: a whole number")
    return {
        "model_type": "internvl_vision",
        "architectures": ["InternVLVisionModel"],
        "hidden_act": "gelu",
        "norm_type": "rms_norm",
        "layer_norm_eps": 1e-6,
        "num_channels": 3,
        "attention_bias": False,
        "use_qk_norm": True,
        **vision,
        "image_size": [chat["image_size"]] * 2,
        "patch_size": [chat["patch_size"]] * 2,
        "layer_scale_init_value": chat.get("initializer_factor", 0.1),
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
    }


def transformers_config(chat: JsonObject, *, image_token_id: int) -> JsonObject:
    """Translate a config.json of the chat layout to transformers' InternVL.

    Args:
        chat: the content of config.json.
        image_token_id: of `<IMG_CONTEXT>`.

    Raises:
        ValueError: a part is missing, or something is configured that the model does not compute.
    """
    for key in ("vision_config", "llm_config"):
        if not isinstance(chat.get(key), Mapping):
            raise ValueError(f"config.json of the chat layout has no {key}; copy the folder's config.json again")
    vision = transformers_vision_config(chat["vision_config"])
    side = chat["vision_config"]["image_size"]
    if (chat.get("force_image_size") or side) != side:
        raise ValueError(
            f"force_image_size={chat['force_image_size']} differs from vision_config.image_size={side}: the position "
            "embeddings would be resized on load; set both to the side of the tiles that the model was trained with"
        )
    if chat.get("select_layer", -1) != -1:
        raise ValueError(f"select_layer={chat['select_layer']} is not supported; accepted: -1, the last layer")
    text = {key: value for key, value in chat["llm_config"].items() if key not in NOT_IN_PARTS}
    tied = bool(text.get("tie_word_embeddings", False))
    version = chat.get("ps_version", "v1")
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "vision_config": vision,
        "text_config": {**text, "tie_word_embeddings": tied},
        "image_token_id": image_token_id,
        "image_seq_length": int((side // chat["vision_config"]["patch_size"] * chat.get("downsample_ratio", 0.5)) ** 2),
        "downsample_ratio": chat.get("downsample_ratio", 0.5),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": tied,
        **({} if version == "v2" else {"ps_version": version}),
        **({"dtype": chat.get("dtype") or chat["torch_dtype"]} if chat.get("dtype") or chat.get("torch_dtype") else {}),
    }


def chat_config(config: JsonObject, *, max_tiles: int | None = None) -> JsonObject:
    """Translate transformers' InternVL configuration to the chat layout, as vLLM's SkyworkR1VChatModel reads it.

    Args:
        config: what `read_hf_config` returns.
        max_tiles: tiles that an image is cut into at most; None: 12.
    """
    architecture = r1v2_architecture(config)
    vision, text = config["vision_config"], dict(config["text_config"])
    text = {key: value for key, value in text.items() if key not in NOT_IN_PARTS}
    text["architectures"] = [_LANGUAGE_CLASSES[text["model_type"]]]
    text["tie_word_embeddings"] = architecture.language.tied_embeddings
    rope = text.get("rope_parameters")
    if isinstance(rope, Mapping):  # transformers 5 has it there, vLLM's and Skywork's readers beside
        text.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        if rope.get("rope_type", "default") != "default":
            text["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    names = {theirs: vision[ours] for ours, theirs in _VISION_KEYS.items() if ours in vision}
    side = architecture.vision.image_size
    dtype = config.get("dtype") or config.get("torch_dtype")
    return {
        "architectures": ["SkyworkR1VChatModel"],
        "model_type": "internvl_chat",
        "vision_config": {
            "model_type": "intern_vit_6b",
            "architectures": ["InternVisionModel"],
            **names,
            "image_size": side,
            "patch_size": architecture.vision.patch_size,
            "initializer_factor": vision.get("layer_scale_init_value", 0.1),
            "dropout": 0.0,
            "drop_path_rate": 0.0,
        },
        "llm_config": text,
        "hidden_size": architecture.language.hidden_size,
        "select_layer": -1,
        "force_image_size": side,
        "downsample_ratio": architecture.downsample_ratio,
        "ps_version": architecture.pixel_shuffle,
        "template": None,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": max_tiles or _DEFAULT_MAX_TILES,
        "tie_word_embeddings": architecture.language.tied_embeddings,
        **({"torch_dtype": dtype} if dtype else {}),
    }
