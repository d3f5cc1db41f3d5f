"""The sizes of a model from its config.json, as transformers reads that file.

transformers' own configuration classes fill in what a file leaves out and find the rotations in either place, so that a
folder means here what it means there. What they let pass and the model does not compute is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeVar, get_args

from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import InternVLConfig, InternVLVisionConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from megatron_r1v2.checkpoint.hf.refusals import Kind, Unsupported
from megatron_r1v2.models.architecture import (
    LanguageArchitecture,
    PixelShuffle,
    R1V2Architecture,
    RopeType,
    VisionArchitecture,
)

Config = Mapping[str, object]


@dataclass(frozen=True)
class _Family:
    """The facts of a family of language models that its HF configuration leaves out."""

    config: type[PreTrainedConfig]
    qkv_bias: bool = False
    qk_norm: bool = False
    windowed: bool = False
    """True where `layer_types` may give a layer a sliding window."""
    refused: tuple[str, ...] = ()
    """Settings that must be off: biases where the language model has none."""


# A new family is a new row.
FAMILIES: Mapping[str, _Family] = {
    "qwen2": _Family(Qwen2Config, qkv_bias=True, windowed=True),
    "qwen3": _Family(Qwen3Config, qk_norm=True, windowed=True, refused=("attention_bias",)),
    "llama": _Family(LlamaConfig, refused=("attention_bias", "mlp_bias")),
}
# Settings of each kind of rotations that its formula reads.
_ROPE_SETTINGS: Mapping[RopeType, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Settings whose zero is no setting, for transformers.
_ROPE_OPTIONAL = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
# Far above every published model; a larger number is damage, and would be allocated.
_Size = Annotated[int, Field(ge=1, le=2**24)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


Keys = TypeVar("Keys", bound=_Checked)


class _Vision(_Checked):
    """The keys of `vision_config` that the tower is built from, after transformers has filled them in."""

    hidden_size: _Size
    num_hidden_layers: _Size
    num_attention_heads: _Size
    intermediate_size: _Size
    num_channels: Literal[3]
    image_size: tuple[_Size, _Size] = Field(strict=False)
    patch_size: tuple[_Size, _Size] = Field(strict=False)
    norm_type: Literal["rms_norm", "layer_norm"]
    layer_norm_eps: _Positive
    attention_bias: bool
    use_qk_norm: bool
    hidden_act: Literal["gelu"]
    use_mean_pooling: bool
    use_mask_token: Literal[False]
    use_absolute_position_embeddings: Literal[True]


class _Language(_Checked):
    """The keys of `text_config` that the language model is built from, after transformers has filled them in."""

    hidden_size: _Size
    num_hidden_layers: _Size
    num_attention_heads: _Size
    num_key_value_heads: _Size | None
    head_dim: _Size | None = None
    intermediate_size: _Size
    vocab_size: _Size
    max_position_embeddings: Annotated[int, Field(ge=1, le=2**31)]
    rms_norm_eps: _Positive
    hidden_act: Literal["silu"]
    use_sliding_window: Literal[False] | None = None


class _Whole(_Checked):
    """The keys of config.json itself, after transformers has filled them in."""

    image_token_id: Annotated[int, Field(ge=0)]
    downsample_ratio: Annotated[float, Field(gt=0, le=1)]
    projector_hidden_act: Literal["gelu"]
    vision_feature_layer: Literal[-1]
    vision_feature_select_strategy: Literal["default"]
    tie_word_embeddings: bool
    # Not a key of transformers': `checkpoint/hf/config.py` carries the chat layout's over.
    ps_version: PixelShuffle = "v2"


def vision_architecture(hf: Config) -> VisionArchitecture:
    """Read the vision tower's sizes from an `internvl_vision` configuration.

    Raises:
        ValueError: something is configured that the tower does not compute.
    """
    _require(hf, "model_type", ("internvl_vision",), "the vision tower")
    _require(hf, "hidden_act", ("gelu",), "the vision tower")
    vision = _check(_Vision, _complete(InternVLVisionConfig, hf, "vision_config"), "vision_config")
    if not vision.use_mean_pooling:
        raise Unsupported(
            "vision settings",
            "vision_config.use_mean_pooling=false adds a final LayerNorm, which InternViT has not; set true",
        )
    if vision.hidden_size % vision.num_attention_heads:
        raise ValueError(
            f"vision_config.hidden_size={vision.hidden_size} is not a multiple of num_attention_heads="
            f"{vision.num_attention_heads}; copy the folder's config.json again"
        )
    image_size = _square(vision.image_size, "vision_config.image_size")
    patch_size = _square(vision.patch_size, "vision_config.patch_size")
    if image_size < patch_size:
        raise ValueError(
            f"vision_config.image_size={image_size} is smaller than patch_size={patch_size}; accepted: a multiple of it"
        )
    return VisionArchitecture(
        hidden_size=vision.hidden_size,
        num_layers=vision.num_hidden_layers,
        num_heads=vision.num_attention_heads,
        ffn_size=vision.intermediate_size,
        image_size=image_size,
        patch_size=patch_size,
        norm=vision.norm_type,
        norm_epsilon=vision.layer_norm_eps,
        qkv_bias=vision.attention_bias,
        qk_norm=vision.use_qk_norm,
    )


def language_architecture(hf: Config) -> LanguageArchitecture:
    """Read the language model's sizes from its HF configuration.

    Args:
        hf: `text_config` of a whole model, or the config.json of a language model alone.

    Raises:
        ValueError: a family or a setting that the language model does not compute.
    """
    _require(hf, "model_type", tuple(FAMILIES), "the language model")
    family = FAMILIES[str(hf["model_type"])]
    if hf.get("use_sliding_window"):
        raise Unsupported("sliding window", "text_config.use_sliding_window=true is not supported; accepted: false")
    for key in family.refused:
        if hf.get(key):
            sentence = f"text_config.{key}={hf[key]!r} of a {hf['model_type']} is not supported; accepted: false"
            raise Unsupported("biases", sentence)
    completed = _complete(family.config, hf, "text_config")
    _require(completed, "hidden_act", ("silu",), "the language model")
    kinds = completed.get("layer_types")
    if family.windowed and isinstance(kinds, list) and set(map(str, kinds)) - {"full_attention"}:
        sentence = f"text_config.layer_types={str(kinds)[:200]} is not supported; accepted: 'full_attention' alone"
        raise Unsupported("sliding window", sentence)
    language = _check(_Language, completed, "text_config")
    pad, size = completed.get("pad_token_id"), language.vocab_size
    if isinstance(pad, int) and not -size <= pad < size:
        raise ValueError(f"text_config.pad_token_id={pad} is outside the vocabulary of vocab_size={size}; set null")
    rope_type, theta, parameters = _rotations(completed, language.max_position_embeddings)
    heads, kv_heads, head_size = _attention_heads(language)
    return LanguageArchitecture(
        model_type=str(hf["model_type"]),
        hidden_size=language.hidden_size,
        num_layers=language.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        ffn_size=language.intermediate_size,
        vocab_size=language.vocab_size,
        max_positions=language.max_position_embeddings,
        rope_theta=theta,
        norm_epsilon=language.rms_norm_eps,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tied_embeddings=completed.get("tie_word_embeddings") is True,
        rope_type=rope_type,
        rope_parameters=tuple(sorted(parameters.items())),
    )


def _attention_heads(language: _Language) -> tuple[int, int, int]:
    """Return the numbers of query and key heads and the size of a head."""
    heads = language.num_attention_heads
    kv_heads = language.num_key_value_heads or heads
    head_size = language.head_dim or language.hidden_size // heads
    if heads % kv_heads:
        raise ValueError(
            f"text_config.num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}; copy the "
            "folder's config.json again"
        )
    # Rotations turn pairs of channels.
    if head_size < 2 or head_size % 2:
        raise ValueError(
            f"text_config gives a head {head_size} channels (head_dim, or hidden_size={language.hidden_size} / "
            f"num_attention_heads={heads}); accepted: an even number; copy the folder's config.json again"
        )
    return heads, kv_heads, head_size


def r1v2_architecture(hf: Config) -> R1V2Architecture:
    """Read the whole model's sizes from an `internvl` configuration (transformers' InternVL layout).

    Embeddings are tied where the outer setting says so, as transformers decides before it looks at the tensors.

    Raises:
        ValueError: something is configured that the model does not compute.
    """
    _require(hf, "model_type", ("internvl",), "the model")
    for key in ("vision_config", "text_config"):
        if key in hf and not isinstance(hf[key], Mapping):
            raise ValueError(f"config.json has {key}={str(hf[key])[:200]!r}; accepted: a mapping of settings")
    text = {"model_type": "qwen2", **_mapping(hf.get("text_config"))}
    vision = {"model_type": "internvl_vision", "hidden_act": "gelu", **_mapping(hf.get("vision_config"))}
    # The parts are read first: their complaints name the part.
    vision_sizes = vision_architecture(vision)
    language = language_architecture(text)
    completed = {
        **_complete(InternVLConfig, hf, "config.json"),
        **{key: hf[key] for key in ("ps_version",) if key in hf},
    }
    _require(completed, "projector_hidden_act", ("gelu",), "the adapter")
    _require(completed, "vision_feature_layer", (-1,), "the model")
    _require(completed, "vision_feature_select_strategy", ("default",), "the model")
    _require({"ps_version": "v2", **completed}, "ps_version", get_args(PixelShuffle), "the model")
    whole = _check(_Whole, completed, "config.json")
    language = replace(language, tied_embeddings=whole.tie_word_embeddings)
    if whole.image_token_id >= language.vocab_size:
        raise Unsupported(
            "image token",
            f"image_token_id={whole.image_token_id} is outside the vocabulary of text_config.vocab_size="
            f"{language.vocab_size}; take the id of <IMG_CONTEXT> from the folder's tokenizer",
        )
    side = vision_sizes.image_size // vision_sizes.patch_size
    if not (side * whole.downsample_ratio).is_integer() or not (1 / whole.downsample_ratio).is_integer():
        raise Unsupported(
            "uneven sizes",
            f"downsample_ratio={whole.downsample_ratio} does not divide the {side} x {side} patches of a tile into "
            "whole squares; accepted: 1, 0.5, 0.25 or another whole part of the side",
        )
    return R1V2Architecture(
        vision=vision_sizes,
        language=language,
        image_token_id=whole.image_token_id,
        downsample_ratio=whole.downsample_ratio,
        pixel_shuffle=whole.ps_version,
    )


def _rotations(completed: Config, max_positions: int) -> tuple[RopeType, float, dict[str, float | bool]]:
    """Return kind, base and settings of the rotations; transformers has put them into `rope_parameters`."""
    rope = _mapping(completed.get("rope_parameters"))
    rope_type = rope.get("rope_type", "default")
    if rope_type not in tuple(_ROPE_SETTINGS):
        accepted = ", ".join(map(repr, _ROPE_SETTINGS))
        raise Unsupported("rotations", f"text_config rope type {rope_type!r} is not supported; accepted: {accepted}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise Unsupported(
            "rotations",
            f"text_config rope's partial_rotary_factor={rope['partial_rotary_factor']!r} is not supported; accepted: 1",
        )
    if nested := next((name for name, value in rope.items() if isinstance(value, Mapping)), None):
        sentence = f"text_config rope's settings for {nested!r} alone are not supported; accepted: the same for all"
        raise Unsupported("rotations", sentence)
    kind: RopeType = next(name for name in _ROPE_SETTINGS if name == rope_type)
    original = "original_max_position_embeddings"
    if kind in ("yarn", "llama3") and original in completed:
        # Beside the rotations, where Phi's and others' files have it, it comes before the one among them.
        rope = {**rope, original: completed[original]}
    settings: dict[str, float | bool] = {}
    for name in ("rope_theta", *_ROPE_SETTINGS[kind]):
        value = rope.get(name)
        if name == "truncate":
            settings |= {name: bool(value)} if name in rope else {}
        elif value is not None and (value or name not in _ROPE_OPTIONAL):
            settings[name] = _positive(value, name)
    if kind == "yarn" and original in settings:
        settings.setdefault("factor", max_positions / settings[original])
    required = (*(["rope_theta"] if rope else []), *([original] if kind == "yarn" else _ROPE_SETTINGS[kind]))
    if missing := [name for name in required if name not in settings]:
        raise ValueError(f"text_config rope's {missing[0]}=None is not accepted; accepted: a number above 0")
    theta = float(settings.pop("rope_theta", 10000.0))
    if kind in ("linear", "dynamic") and settings["factor"] == 1.0:
        return "default", theta, {}
    return kind, theta, settings


def _positive(value: object, name: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf"):
        return value
    sentence = f"text_config rope's {name}={repr(value)[:200]} is not accepted; accepted: a number above 0"
    raise Unsupported("rotations", sentence)


def _complete(kind: type[PreTrainedConfig], hf: Config, where: str) -> dict[str, object]:
    """Return a configuration with every key that its file leaves out, as transformers fills them in."""
    try:
        completed: dict[str, object] = kind.from_dict(_copied(hf)).to_dict()
    except (
        StrictDataclassError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{where} is refused by transformers: {reason}; copy the folder's config.json again"
        ) from error
    return completed


def _copied(value: Config) -> dict[str, object]:
    """Copy mappings at every depth: transformers writes into those that it is given."""
    return {key: _copied(item) if isinstance(item, Mapping) else item for key, item in value.items()}


def _check(kind: type[Keys], completed: Config, where: str) -> Keys:
    try:
        return kind.model_validate(completed)
    except ValidationError as error:
        first = error.errors()[0]
        name = f"{where}." if where != "config.json" else ""
        key = first["loc"][0]
        sentence = (
            f"{name}{key}={str(first['input'])[:200]!r} is not accepted: {first['msg'].lower()}; copy the folder's "
            "config.json again"
        )
        if first["type"] != "literal_error":
            raise ValueError(sentence) from error
        raise Unsupported("activation" if "_act" in str(key) else "vision settings", sentence) from error


def _mapping(value: object) -> dict[str, object]:
    return dict(value) if isinstance(value, Mapping) else {}


def _require(hf: Config, key: str, accepted: Sequence[object], what: str) -> None:
    value = hf.get(key)
    if value not in accepted:
        kind: Kind = "model family" if key == "model_type" else "activation" if "_act" in key else "vision settings"
        sentence = f"{key}={repr(value)[:200]} of {what} is not supported; accepted: {', '.join(map(repr, accepted))}"
        raise Unsupported(kind, sentence)


def _square(sides: tuple[int, int], name: str) -> int:
    if sides[0] != sides[1]:
        sentence = f"{name}={list(sides)} is not square; tiles and patches must have equal sides"
        raise Unsupported("vision settings", sentence)
    return sides[0]
