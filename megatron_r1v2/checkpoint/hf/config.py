"""The config.json of both Hugging Face layouts, each made from the other; no remote code is run for either.

Everything else in the package reads the one of transformers (`model_type: internvl`). The chat layout
(`model_type: internvl_chat`, Skywork's own `skywork_chat`) is what OpenGVLab and Skywork publish: `vision_config`,
`llm_config` with its `architectures`, `select_layer`, `force_image_size`, `downsample_ratio`, `ps_version`,
`min_dynamic_patch`, `max_dynamic_patch`, `dynamic_image_size` and `use_thumbnail`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from megatron_r1v2.checkpoint.hf.architecture import Config, r1v2_architecture
from megatron_r1v2.checkpoint.hf.folders import SafetensorsFolder, read_json
from megatron_r1v2.checkpoint.hf.mapping import HF_EMBEDDING, HF_OUTPUT, Layout, stored_names
from megatron_r1v2.checkpoint.hf.processor import pixel_statistics
from megatron_r1v2.checkpoint.hf.refusals import Unsupported, check_config, check_folder
from megatron_r1v2.models.architecture import R1V2Architecture

IMAGE_TOKEN = "<IMG_CONTEXT>"
# Keys of a component's own file, which have no place in a part of another configuration.
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
CHAT_TYPES = ("internvl_chat", "skywork_chat")
# Folders whose vision_config, or whose whole config.json, has the chat layout's names.
VISION_TYPES_OF_CHAT = ("intern_vit_6b", "skywork_vit", *CHAT_TYPES)
# Defaults of the classes in the chat layout's configuration files (configuration_internvl_chat.py, _skywork_chat.py,
# _intern_vit.py).
_CHAT_DEFAULTS: Mapping[str, object] = {"ps_version": "v1", "select_layer": -1, "downsample_ratio": 0.5}
_CHAT_VISION_DEFAULTS: Mapping[str, object] = {
    "hidden_size": 3200,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "qkv_bias": False,
    "qk_normalization": True,
    "initializer_factor": 0.1,
}
_LANGUAGE_CLASSES: Mapping[str, str] = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
_DEFAULT_MAX_TILES = 12


def layout_of(config: Config) -> Layout:
    """Return the layout of a config.json.

    Raises:
        ValueError: it has neither.
    """
    model_type = config.get("model_type")
    if model_type == "internvl":
        return "transformers"
    if model_type in CHAT_TYPES:
        return "chat"
    raise Unsupported(
        "model family",
        f"config.json has model_type={str(model_type)[:200]!r}, which is no InternVL; accepted: 'internvl' "
        "(transformers' layout), 'internvl_chat' and 'skywork_chat' (OpenGVLab's and Skywork's); a language model or a "
        "vision tower alone is for reassemble",
    )


def folder_layout(folder: Path) -> Layout:
    """Return the layout of a folder's config.json."""
    check_folder(folder)
    return layout_of(read_json(folder / "config.json"))


def read_hf_config(folder: Path | str) -> tuple[dict[str, object], Layout]:
    """Read config.json of a folder in either layout.

    Args:
        folder: a whole model, or what lies beside the weights of one.

    Returns:
        The configuration as transformers' InternVL has it, with `ps_version` where it is not v2, and with the
        `tie_word_embeddings` that holds for the folder's tensors; and the layout.

    Raises:
        ValueError: it is missing, or configures something that the model does not compute.
    """
    check_folder(folder)
    config = read_json(Path(folder) / "config.json")
    layout = layout_of(config)
    check_config(config, folder)
    if layout == "chat":
        config = transformers_config(config, image_token_id=image_token_id(folder))
    if any(Path(folder).glob("*.safetensors")):
        config = _with_tie_of_tensors(config, Path(folder), layout)
    return config, layout


def sizes_config(config: Config) -> Config:
    """Return a config.json of either layout in that of transformers, without the tokenizer's `image_token_id`."""
    return transformers_config(config, image_token_id=0) if config.get("model_type") in CHAT_TYPES else config


def read_hf_architecture(folder: Path | str) -> tuple[R1V2Architecture, Layout]:
    """Read the sizes of the model in a folder of either layout, with the pixel statistics of its image processor."""
    config, layout = read_hf_config(folder)
    return folder_architecture(config, folder), layout


def folder_architecture(config: Config, folder: Path | str) -> R1V2Architecture:
    """Return the sizes of the model that a configuration describes, with the pixel statistics of a folder."""
    architecture, statistics = r1v2_architecture(config), pixel_statistics(folder)
    if statistics is None:
        return architecture
    mean, std = statistics
    return replace(architecture, vision=replace(architecture.vision, pixel_mean=mean, pixel_std=std))


def _with_tie_of_tensors(config: dict[str, object], folder: Path, layout: Layout) -> dict[str, object]:
    """Decide as transformers does whether embedding and output matrix are one.

    The outer setting (true where it is left out) says what is meant. Where the file has both tensors and they differ,
    they are two all the same; transformers warns then, and keeps both.
    """
    tied = config.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise ValueError(f"config.json has tie_word_embeddings={repr(tied)[:200]}; accepted: true or false")
    if tied:
        with SafetensorsFolder(folder) as tensors:
            tied = are_tied(tensors, stored_names(tensors.names(), layout, tied=False))
    text = config.get("text_config")
    inner = {"text_config": {**text, "tie_word_embeddings": tied}} if isinstance(text, Mapping) else {}
    return {**config, "tie_word_embeddings": tied, **inner}


def are_tied(folder: SafetensorsFolder, stored: Mapping[str, str]) -> bool:
    """Return whether embedding and output matrix are one, where the configuration means them to be.

    Args:
        stored: the name of a tensor in the folder by the table's name of it.
    """
    if not {HF_OUTPUT, HF_EMBEDDING} <= stored.keys():
        return True
    return _are_equal(folder.tensor(stored[HF_OUTPUT]), folder.tensor(stored[HF_EMBEDDING]))


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare piece by piece: matrices that differ do so in the first rows, and those of 38B are 1.5 GB each."""
    if one.shape != other.shape:
        return False
    wide = torch.promote_types(one.dtype, other.dtype)
    pieces = zip(torch.split(one, 1024), torch.split(other, 1024), strict=True)
    return all(torch.equal(a.to(wide), b.to(wide)) for a, b in pieces)


def image_token_id(folder: Path | str) -> int:
    """Look `<IMG_CONTEXT>` up in the tokenizer files, which the chat layout's config.json leaves it to.

    Raises:
        ValueError: no file of the tokenizer has it.
    """
    for text, number in _listed_tokens(Path(folder)):
        if text == IMAGE_TOKEN and str(number).isdecimal():
            return int(str(number))
    raise ValueError(
        f"{folder}: no tokenizer file (added_tokens.json, vocab.json, tokenizer_config.json, tokenizer.json) has "
        f"{IMAGE_TOKEN}, whose id the chat layout leaves to the tokenizer; copy the tokenizer's files into the folder"
    )


def _listed_tokens(folder: Path) -> Iterator[tuple[object, object]]:
    """Yield text and id of the tokens that a tokenizer's files list."""
    read = {
        name: read_json(folder / name)
        for name in ("added_tokens.json", "vocab.json", "tokenizer_config.json", "tokenizer.json")
        if (folder / name).is_file()
    }
    for name in ("added_tokens.json", "vocab.json"):
        yield from read.get(name, {}).items()
    decoder = read.get("tokenizer_config.json", {}).get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        yield _mapping(token).get("content"), number
    added = read.get("tokenizer.json", {}).get("added_tokens")
    for token in added if isinstance(added, list) else ():
        yield _mapping(token).get("content"), _mapping(token).get("id")


def _mapping(value: object) -> Config:
    return value if isinstance(value, Mapping) else {}


def transformers_vision_config(chat: Config) -> dict[str, object]:
    """Translate the vision_config of the chat layout, or the config.json of a published InternViT."""
    chat = {**_CHAT_VISION_DEFAULTS, **{key: value for key, value in chat.items() if value is not None}}
    if chat["hidden_act"] != "gelu":
        sentence = f"vision_config.hidden_act={repr(chat['hidden_act'])[:200]} is not supported; accepted: 'gelu'"
        raise Unsupported("activation", sentence)
    if chat.get("use_moe"):
        sentence = "vision_config.use_moe=true is not supported; accepted: false, no mixture of experts"
        raise Unsupported("mixture of experts", sentence)
    for key in ("hidden_size", "num_hidden_layers", "image_size", "patch_size"):
        size = chat[key]
        if type(size) is not int or size < 1:
            raise ValueError(f"vision_config has {key}={size!r}, no InternViT's; accepted: a whole number")
    return {
        "model_type": "internvl_vision",
        "architectures": ["InternVLVisionModel"],
        **{ours: chat[theirs] for ours, theirs in _VISION_KEYS.items() if theirs in chat},
        "image_size": [chat["image_size"]] * 2,
        "patch_size": [chat["patch_size"]] * 2,
        "layer_scale_init_value": chat["initializer_factor"],
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
    }


def transformers_config(chat: Config, *, image_token_id: int) -> dict[str, object]:
    """Translate a config.json of the chat layout to transformers' InternVL.

    Raises:
        ValueError: a part is missing, or something is configured that the model does not compute.
    """
    parts: dict[str, Config] = {}
    for key in ("vision_config", "llm_config"):
        part = chat.get(key)
        if not isinstance(part, Mapping):
            raise ValueError(f"config.json of the chat layout has no {key}; copy the folder's config.json again")
        parts[key] = part
    for key in ("use_backbone_lora", "use_llm_lora"):
        if chat.get(key):
            sentence = (
                f"{key}={repr(chat[key])[:200]}: the folder holds LoRA adapters; merge them into the weights first"
            )
            raise Unsupported("LoRA adapters", sentence)
    vision = transformers_vision_config(parts["vision_config"])
    side, patch = (_first(vision[key]) for key in ("image_size", "patch_size"))
    if (chat.get("force_image_size") or side) != side:
        stated = str(chat["force_image_size"])[:200]
        raise Unsupported(
            "resized positions",
            f"force_image_size={stated} differs from vision_config.image_size={side}: the position embeddings would be "
            "resized on load; set both to the side of the tiles that the model was trained with",
        )
    chat = {**_CHAT_DEFAULTS, **{key: value for key, value in chat.items() if value is not None}}
    if chat["select_layer"] != -1:
        sentence = f"select_layer={str(chat['select_layer'])[:200]} is not supported; accepted: -1, the last layer"
        raise Unsupported("vision settings", sentence)
    ratio = chat["downsample_ratio"]
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise ValueError(
            f"downsample_ratio={repr(ratio)[:200]} is not accepted; accepted: a number above 0 and up to 1"
        )
    text = {key: value for key, value in parts["llm_config"].items() if key not in NOT_IN_PARTS}
    named = _model_type_of(text)
    model_type = text.setdefault("model_type", named)
    if model_type in tuple(_LANGUAGE_CLASSES) and named not in (None, model_type):
        # The publishers' code goes by the class, so one of the two is not that of the weights.
        sentence = f"llm_config has model_type={model_type!r} and architectures of {str(named)[:200]!r}; correct one"
        raise Unsupported("model family", sentence)
    # The language model's own class ties; a key beside the parts says nothing.
    tied = text.get("tie_word_embeddings") is True
    version, dtype = chat["ps_version"], chat.get("dtype") or chat.get("torch_dtype")
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "vision_config": vision,
        "text_config": {**text, "tie_word_embeddings": tied},
        "image_token_id": image_token_id,
        "image_seq_length": int((side // patch * ratio) ** 2),
        "downsample_ratio": float(ratio),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": tied,
        **({} if version == "v2" else {"ps_version": version}),
        **({"dtype": dtype} if dtype else {}),
    }


def _first(sides: object) -> int:
    assert isinstance(sides, list)
    return int(sides[0])


def _model_type_of(text: Config) -> object:
    """Return the family of a language model whose part names only its class, as the chat layout's code allows."""
    named = text.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return next((family for family, name in _LANGUAGE_CLASSES.items() if name == first), first)


def chat_config(config: Config, *, max_tiles: int | None = None) -> dict[str, object]:
    """Translate transformers' InternVL configuration to the chat layout, as vLLM's SkyworkR1VChatModel reads it.

    Args:
        config: what `read_hf_config` returns.
        max_tiles: tiles that an image is cut into at most; None: 12.
    """
    architecture = r1v2_architecture(config)
    vision, text = config["vision_config"], config["text_config"]
    assert isinstance(vision, Mapping)
    assert isinstance(text, Mapping)
    text = {key: value for key, value in text.items() if key not in NOT_IN_PARTS}
    text["architectures"] = [_LANGUAGE_CLASSES[architecture.language.model_type]]
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
