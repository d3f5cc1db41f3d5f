"""The files beside the weights of a whole model: config.json, tokenizer and processor, made from components or copied.

The weights themselves are spliced by `checkpoint_tools`, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from megatron_r1v2.checkpoint.hf.architecture import Config, language_architecture, r1v2_architecture
from megatron_r1v2.checkpoint.hf.chat_template import give_image_parts
from megatron_r1v2.checkpoint.hf.config import (
    CHAT_TYPES,
    NOT_IN_PARTS,
    VISION_TYPES_OF_CHAT,
    are_tied,
    chat_config,
    read_hf_config,
    transformers_vision_config,
)
from megatron_r1v2.checkpoint.hf.folders import (
    JsonObject,
    SafetensorsFolder,
    companion_files,
    copy_companions,
    read_json,
    with_dtype,
)
from megatron_r1v2.checkpoint.hf.mapping import Layout
from megatron_r1v2.checkpoint.hf.processor import Colours, pixel_statistics, stated_processor
from megatron_r1v2.checkpoint.hf.refusals import check_config, check_folder
from megatron_r1v2.data.tokenizer import load_tokenizer
from megatron_r1v2.models.architecture import PixelShuffle
from megatron_r1v2.resilience.files import write_json

# Roles that transformers' InternVLProcessor looks for in the tokenizer, and the token of each.
_IMAGE_TOKENS: Mapping[str, str] = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
DEFAULT_MAX_TILES = 12
_TOKENIZERS = frozenset(("tokenizer.json", "tokenizer.model", "vocab.json"))
"""Files that hold a vocabulary, one of which every tokenizer has."""


@dataclass(frozen=True)
class Components:
    """The parts that a whole model is spliced from, and the choices of the splicing."""

    vision: Path
    """Folder of an InternViT as transformers saves it (`internvl_vision`) or as OpenGVLab published it
    (`intern_vit_6b`), or of a whole model in either layout, whose tower is taken."""
    language: Path
    """Folder of a causal language model with its tokenizer."""
    adapter: Path | None = None
    """Folder or safetensors file with `multi_modal_projector.*` or `mlp1.*`; None: random."""
    downsample_ratio: float = 0.5
    """0.5 makes one image token of four patches."""
    pixel_shuffle: PixelShuffle | None = None
    """Of a random adapter, or of one that does not say it; None: the adapter's own, else v2. Only the chat layout can
    hold v1."""
    max_tiles: int = DEFAULT_MAX_TILES
    """Tiles that the image processor cuts an image into at most."""
    dtype: torch.dtype | None = None
    """Dtype of the result; None: that of the components, which must agree."""
    seed: int = 0
    """Of a random adapter."""
    untie_embeddings: bool = False
    """Give a language model that uses its embedding as output matrix a copy of it there, so that training tells them
    apart."""


def components_config(components: Components) -> JsonObject:
    """Return the configuration of the whole model, in transformers' layout.

    Raises:
        ValueError: the components have configurations that do not make a model.
    """
    for folder in (components.vision, components.language, *([components.adapter] if components.adapter else [])):
        check_folder(folder)
    _, _, image_token_id, num_tokens = _with_image_tokens(components.language)
    config = read_json(components.vision / "config.json")
    check_config(config, components.vision)
    vision = config.get("vision_config", config) if config.get("model_type") != "internvl_vision" else config
    if not isinstance(vision, Mapping):
        raise ValueError(f"{components.vision}: vision_config={str(vision)[:200]!r} is no configuration; copy it again")
    if config.get("model_type") in VISION_TYPES_OF_CHAT:
        vision = transformers_vision_config(vision)
    text = read_json(components.language / "config.json")
    check_config(text, components.language)
    parts = ("architectures", *NOT_IN_PARTS)
    vision, text = ({k: v for k, v in part.items() if k not in parts} for part in (vision, text))
    if type(text.get("vocab_size")) is int:  # a folder that is no language model is refused in words below
        text["vocab_size"] = max(text["vocab_size"], num_tokens)
    if components.untie_embeddings:
        text["tie_word_embeddings"] = False
    whole: JsonObject = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "vision_config": vision,
        "text_config": text,
        "image_token_id": image_token_id,
        "downsample_ratio": components.downsample_ratio,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }
    tied = language_architecture(text).tied_embeddings
    if tied:
        with SafetensorsFolder(components.language) as tensors:
            tied = are_tied(tensors, {f"language_model.{name}": name for name in tensors.names()})
    whole["tie_word_embeddings"] = text["tie_word_embeddings"] = tied
    version = _pixel_shuffle_of(components)
    if version != "v2":
        whole["ps_version"] = version
    architecture = r1v2_architecture(whole)
    side = architecture.vision.image_size // architecture.vision.patch_size
    if (side * components.downsample_ratio) % 1:
        raise ValueError(
            f"downsample_ratio={components.downsample_ratio} does not fit the {side} x {side} patches of a tile; "
            "choose one that gives a whole number, such as 0.5 for an even side"
        )
    whole["image_seq_length"] = architecture.tokens_per_tile
    return whole


def check_companions(source: Path) -> None:
    """Check the files beside the weights, before the weights are read.

    Raises:
        ValueError: a file is not valid JSON, or the tokenizer is missing or cannot be loaded.
    """
    check_folder(source)
    files = companion_files(source)
    for path in files:
        if path.suffix == ".json":
            read_json(path)
        if path.name == "tokenizer.json":
            _load_tokenizer(path)
    names = {path.name for path in files}
    if not names & _TOKENIZERS or "tokenizer_config.json" not in names:
        raise ValueError(
            f"{source} has no tokenizer; accepted: tokenizer_config.json and one of {', '.join(sorted(_TOKENIZERS))}; "
            "copy the tokenizer's files into the folder"
        )


def make_components_companions(
    components: Components, config: JsonObject, folder: Path, layout: Layout, dtypes: Iterable[torch.dtype]
) -> None:
    """Write config.json, tokenizer and processor of a spliced model."""
    copy_companions(components.language, folder)
    _add_image_tokens(components.language, folder)
    _write_portable_tokenizer(folder)
    give_image_parts(folder)
    if layout == "chat":
        whole = chat_config(config, max_tiles=components.max_tiles)
    else:
        whole = dict(config)
    write_processor(folder, config, max_tiles=components.max_tiles, statistics=pixel_statistics(components.vision))
    write_json(folder / "config.json", with_dtype(whole, dtypes))


def make_companions(source: Path, folder: Path, layout: Layout | None, dtypes: Iterable[torch.dtype]) -> None:
    """Write config.json, tokenizer and processor of a model from those of a folder in either layout.

    Args:
        layout: of the new folder; None: that of the source.

    Raises:
        ValueError: `source` lacks something.
    """
    copy_companions(source, folder)
    config, found = read_hf_config(source)
    stated, statistics = stated_processor(source), pixel_statistics(source)
    if layout in (None, found):
        if found == "transformers":
            # transformers 5 may have the image processor in processor_config.json alone, where 4.57 does not look.
            write_processor(folder, config, max_tiles=_max_tiles(stated), statistics=statistics, replace=False)
        config = read_json(source / "config.json")
    elif layout == "chat":
        config = chat_config(config, max_tiles=_max_tiles(stated))
    else:
        _add_image_tokens(source, folder)
        give_image_parts(folder)
        write_processor(folder, config, max_tiles=_chat_max_tiles(source), statistics=statistics)
    if layout is not None:
        _write_portable_tokenizer(folder)
    write_json(folder / "config.json", with_dtype(config, dtypes))


def _max_tiles(stated: Config) -> int:
    value = stated.get("max_patches")
    return value if isinstance(value, int) else DEFAULT_MAX_TILES


def _chat_max_tiles(source: Path) -> int:
    """Return the most tiles of an image in a folder of the chat layout; keys left out as its class has them."""
    config = read_json(source / "config.json")
    value = config.get("max_dynamic_patch", 6)
    if type(value) is not int or value < 1:
        raise ValueError(
            f"{source}: max_dynamic_patch={str(value)[:200]!r} is not accepted; accepted: a whole number from 1; copy "
            "the folder's config.json again"
        )
    return value if config.get("dynamic_image_size") else 1


def _write_portable_tokenizer(folder: Path) -> None:
    """Rewrite tokenizer_config.json so that transformers 4.57 loads it too: 5 has other names for the same things."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path)
    settings.pop("backend", None)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = settings.pop("extra_special_tokens", None)
    if isinstance(extra, list) and extra:
        settings["additional_special_tokens"] = extra
    # 4.57 adds token_type_ids otherwise, which no model here takes.
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    # Both versions give each of these to the tokenizer as an attribute, which InternVLProcessor reads.
    roles = {role: settings[role] for role in _IMAGE_TOKENS if role in settings}
    named = {**(extra if isinstance(extra, dict) else {}), **roles}
    write_json(path, {**settings, **({"extra_special_tokens": named} if named else {})})


def _pixel_shuffle_of(components: Components) -> PixelShuffle:
    """Return the pixel shuffle that the adapter was trained with; for a random one, the chosen one.

    Raises:
        ValueError: another one is chosen, or nothing says which it is.
    """
    chosen, adapter = components.pixel_shuffle, components.adapter
    if adapter is None:
        return chosen or "v2"
    own = _stated_pixel_shuffle(adapter)
    if own is None and chosen is None:
        raise ValueError(
            f"{adapter} has an adapter of the chat layout and no config.json, which would say its pixel shuffle "
            "(ps_version); give --pixel-shuffle v1 or v2, or the whole model's folder as --adapter"
        )
    if own is not None and chosen not in (None, own):
        raise ValueError(
            f"--pixel-shuffle={chosen} is not that of the adapter in {adapter}, which was trained with {own}; leave "
            "--pixel-shuffle out"
        )
    return own or chosen or "v2"


def _stated_pixel_shuffle(adapter: Path) -> PixelShuffle | None:
    """Return the pixel shuffle that an adapter's config.json says, or its tensors' names; None: neither does."""
    path = (adapter.parent if adapter.is_file() else adapter) / "config.json"
    config = read_json(path) if path.is_file() else {}
    if config.get("model_type") in CHAT_TYPES:
        # The first is the default of the publishers' class.
        return config.get("ps_version") or "v1"
    with SafetensorsFolder(adapter) as tensors:
        is_chat = any(name.startswith("mlp1.") for name in tensors.names())
    return None if is_chat else "v2"


def _with_image_tokens(language: Path) -> tuple[Tokenizer, list[str], int, int]:
    """Add the image tokens that a tokenizer lacks.

    Returns:
        The tokenizer, what was added, the id of `<IMG_CONTEXT>`, and how many rows the embedding needs.
    """
    files = tokenizer_files(language)
    # tokenizer.json is edited, not saved by transformers: what a tokenizer class would change on the way stays.
    tokenizer = _load_tokenizer(files[0]) if len(files) == 1 else _build_tokenizer(language)
    missing = [token for token in _IMAGE_TOKENS.values() if tokenizer.token_to_id(token) is None]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return tokenizer, missing, vocabulary[_IMAGE_TOKENS["context_image_token"]], max(vocabulary.values()) + 1


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's tokenizer: tokenizer.json, or vocab.json and merges.txt of older folders.

    Raises:
        ValueError: it has neither.
    """
    for names in (("tokenizer.json",), ("vocab.json", "merges.txt")):
        if all((folder / name).is_file() for name in names):
            return [folder / name for name in names]
    raise ValueError(
        f"{folder} has no tokenizer.json, nor vocab.json with merges.txt; save its tokenizer there with "
        "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _build_tokenizer(folder: Path) -> Tokenizer:
    """Build the tokenizer of a folder without tokenizer.json, as transformers does."""
    try:
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: no tokenizer can be loaded from it: {error}; copy its files again") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{folder}: transformers has no fast tokenizer for it; save it there with a tokenizer.json")
    backend: Tokenizer = tokenizer.backend_tokenizer
    return backend


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises this class itself, for whatever is wrong
        raise ValueError(f"{path} cannot be loaded: {error}; copy the tokenizer's files again") from error


def _add_image_tokens(source: Path, folder: Path) -> None:
    """Write the tokenizer of `source`, with image tokens and their roles, into `folder`, which has a copy of it."""
    tokenizer, missing, _, _ = _with_image_tokens(source)
    if missing or not (folder / "tokenizer.json").exists():
        tokenizer.save(str(folder / "tokenizer.json"))
    settings_path = folder / "tokenizer_config.json"
    settings = read_json(settings_path)
    settings.update(_IMAGE_TOKENS)
    if "added_tokens_decoder" in settings:
        for token in missing:
            entry = {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
            settings["added_tokens_decoder"][str(tokenizer.token_to_id(token))] = {**entry, "special": True}
    write_json(settings_path, settings)


def write_processor(
    folder: Path,
    config: JsonObject,
    *,
    max_tiles: int,
    statistics: tuple[Colours, Colours] | None,
    replace: bool = True,
) -> None:
    """Write the processor files that transformers' InternVLProcessor reads.

    Args:
        config: in transformers' layout, with `image_seq_length`.
        statistics: of the tower's own folder; None: ImageNet's.
    """
    architecture = r1v2_architecture(config)
    vision = architecture.vision
    side = vision.image_size
    mean, std = statistics or (vision.pixel_mean, vision.pixel_std)
    common = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "processor_class": "InternVLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }
    image = {"crop_to_patches": True, "min_patches": 1, "max_patches": max_tiles}
    files = {
        "preprocessor_config.json": {**common, **image, "image_processor_type": "GotOcr2ImageProcessor"},
        "video_preprocessor_config.json": {**common, "video_processor_type": "InternVLVideoProcessor"},
        "processor_config.json": {
            "processor_class": "InternVLProcessor",
            "image_seq_length": architecture.tokens_per_tile,
        },
    }
    for name, content in files.items():
        if replace or not (folder / name).exists():
            write_json(folder / name, content)
