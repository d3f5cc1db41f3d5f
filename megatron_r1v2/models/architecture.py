"""The sizes of a model, read from its HF configuration only.

A configuration that asks for something the model does not compute is an error here, before any weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

PixelShuffle = Literal["v1", "v2"]
HFConfig = Mapping[str, Any]
"""A decoded config.json, or a part of it."""

FUSED_NORM_NAMES: Mapping[str, str] = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""The local name of a norm -> its name in TransformerEngine's layers, which fuse the norm with the linear after it."""


@dataclass(frozen=True)
class VisionArchitecture:
    """An InternViT: the 6B family (RMSNorm, QK norm over all heads, no qkv bias) or the 300M family."""

    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    image_size: int
    """Pixels along each side of a tile."""
    patch_size: int
    norm: Literal["rms_norm", "layer_norm"]
    norm_epsilon: float
    qkv_bias: bool
    qk_norm: bool
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from pixel values in [0, 1], per colour."""
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @property
    def head_size(self) -> int:
        """Return the number of channels of one head."""
        return self.hidden_size // self.num_heads

    @property
    def num_patches(self) -> int:
        """Return the number of patches of one tile."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class LanguageArchitecture:
    """A dense decoder of the Qwen2 / Llama / Qwen3 families."""

    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    norm_epsilon: float
    qkv_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    rope_factor: float = 1.0
    """The factor by which Llama 3.1 and later stretch the slow rotations (`rope_type: llama3`); 1 leaves them."""


@dataclass(frozen=True)
class R1V2Architecture:
    """The whole model."""

    vision: VisionArchitecture
    language: LanguageArchitecture
    image_token_id: int
    """Id of `<IMG_CONTEXT>` in this checkpoint's tokenizer."""
    downsample_ratio: float
    pixel_shuffle: PixelShuffle = "v2"

    @property
    def tokens_per_tile(self) -> int:
        """Return F, the image tokens that one tile becomes."""
        return int(self.vision.num_patches * self.downsample_ratio**2)

    @property
    def adapter_input_size(self) -> int:
        """Return K, the channels of an image token before the adapter."""
        return int(self.vision.hidden_size / self.downsample_ratio**2)


def vision_architecture(hf: HFConfig) -> VisionArchitecture:
    """Read the vision tower's sizes from an `internvl_vision` configuration.

    Raises:
        ValueError: the configuration asks for something that the tower does not compute.
    """
    _require(hf, "model_type", ("internvl_vision",), "the vision tower")
    _require(hf, "hidden_act", ("gelu",), "the vision tower")
    if not hf.get("use_mean_pooling", True):
        raise ValueError(
            "vision_config.use_mean_pooling=false adds a final LayerNorm, which InternViT has not; set true"
        )
    return VisionArchitecture(
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        ffn_size=hf["intermediate_size"],
        image_size=_square(hf["image_size"], "vision_config.image_size"),
        patch_size=_square(hf["patch_size"], "vision_config.patch_size"),
        norm=hf["norm_type"],
        norm_epsilon=hf["layer_norm_eps"],
        qkv_bias=hf["attention_bias"],
        qk_norm=hf["use_qk_norm"],
    )


def language_architecture(hf: HFConfig) -> LanguageArchitecture:
    """Read the language model's sizes from its HF configuration.

    Raises:
        ValueError: the family or a setting is one that the language model does not compute.
    """
    _require(hf, "model_type", tuple(_FAMILIES), "the language model")
    _require(hf, "hidden_act", ("silu",), "the language model")
    if hf.get("use_sliding_window"):
        raise ValueError("text_config.use_sliding_window=true is not supported; accepted: false")
    family = _FAMILIES[hf["model_type"]]
    for key in family.refused:
        if hf.get(key):
            raise ValueError(f"text_config.{key}={hf[key]!r} of a {hf['model_type']} is not supported; accepted: false")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    num_heads = hf["num_attention_heads"]
    return LanguageArchitecture(
        model_type=hf["model_type"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=hf.get("num_key_value_heads") or num_heads,
        head_size=hf.get("head_dim") or hf["hidden_size"] // num_heads,
        ffn_size=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        max_positions=hf["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
        norm_epsilon=hf["rms_norm_eps"],
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        rope_factor=_rope_factor(rope),
    )


def read_architecture(folder: Path | str) -> R1V2Architecture:
    """Read the sizes of the model in an HF folder, and the pixel statistics of its image processor.

    Args:
        folder: in transformers' InternVL layout.

    Raises:
        ValueError: the configuration asks for something that the model does not compute.
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return with_pixel_statistics(r1v2_architecture(config), folder)


def with_pixel_statistics(architecture: R1V2Architecture, folder: Path | str) -> R1V2Architecture:
    """Return the architecture with the pixel statistics of the image processor in a folder, if it has one."""
    processor = Path(folder) / "preprocessor_config.json"
    if not processor.is_file():
        return architecture
    stated = json.loads(processor.read_text(encoding="utf-8"))
    vision = replace(
        architecture.vision,
        pixel_mean=tuple(stated.get("image_mean", architecture.vision.pixel_mean)),
        pixel_std=tuple(stated.get("image_std", architecture.vision.pixel_std)),
    )
    return replace(architecture, vision=vision)


def r1v2_architecture(hf: HFConfig) -> R1V2Architecture:
    """Read the whole model's sizes from an `internvl` configuration (transformers' InternVL layout).

    Raises:
        ValueError: the configuration asks for something that the model does not compute.
    """
    _require(hf, "model_type", ("internvl",), "the model")
    _require(hf, "projector_hidden_act", ("gelu",), "the adapter")
    _require(hf, "vision_feature_layer", (-1,), "the model")
    _require(hf, "vision_feature_select_strategy", ("default",), "the model")
    # transformers has no such key, since it implements v2 only; `hf_config` carries it over from the chat layout.
    pixel_shuffle = hf.get("ps_version", "v2")
    if pixel_shuffle not in ("v1", "v2"):
        raise ValueError(f"ps_version={pixel_shuffle!r} is not supported; accepted: 'v1', 'v2'")
    text = dict(hf["text_config"])
    # The outer flag decides, as in transformers.
    text["tie_word_embeddings"] = bool(hf.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    return R1V2Architecture(
        vision=vision_architecture(hf["vision_config"]),
        language=language_architecture(text),
        image_token_id=hf["image_token_id"],
        downsample_ratio=hf["downsample_ratio"],
        pixel_shuffle=pixel_shuffle,
    )


@dataclass(frozen=True)
class _Family:
    """The properties of a family that its HF configuration implies without stating them."""

    qkv_bias: bool = False
    qk_norm: bool = False
    refused: tuple[str, ...] = ()
    """Settings that must be off: biases where the language model has none."""


# A new family is a new row.
_FAMILIES: Mapping[str, _Family] = {
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(qk_norm=True, refused=("attention_bias",)),
    "llama": _Family(refused=("attention_bias", "mlp_bias")),
}
# Of Llama 3's rotations, megatron-core takes the factor as an argument; these other values are constants in its code.
_LLAMA3_ROPE: Mapping[str, float] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _rope_factor(rope: HFConfig) -> float:
    """Return the stretch of the slow rotations, from `rope_parameters` or the older `rope_scaling`."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"text_config rope type {rope_type!r} is not supported; accepted: 'default', 'llama3'")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"text_config rope's partial_rotary_factor={rope['partial_rotary_factor']!r} is not supported; accepted: 1"
        )
    if rope_type == "default":
        return 1.0
    for key, computed in _LLAMA3_ROPE.items():
        if rope.get(key) != computed:
            raise ValueError(
                f"text_config rope's {key}={rope.get(key)!r} is not supported with rope_type 'llama3'; megatron-core "
                f"computes {computed:g}, as Llama 3.1 to 3.3 have it"
            )
    return float(rope["factor"])


def _require(hf: HFConfig, key: str, accepted: tuple[object, ...], what: str) -> None:
    value = hf.get(key)
    if value not in accepted:
        raise ValueError(f"{key}={value!r} of {what} is not supported; accepted: {', '.join(map(repr, accepted))}")


def _square(size: int | Sequence[int], name: str) -> int:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if sides[0] != sides[1]:
        raise ValueError(f"{name}={size!r} is not square; tiles and patches must have equal sides")
    return int(sides[0])
