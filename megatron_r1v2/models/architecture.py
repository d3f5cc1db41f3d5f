"""The sizes of a model; `checkpoint/hf/architecture.py` reads them from a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_r1v2.config.layout import LanguageSizes

PixelShuffle = Literal["v1", "v2"]
RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3"]

# In the main module of sizes, because layers, checkpoints and conversion all need the same names.
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
    rope_type: RopeType = "default"
    """The kind of stretching of the rotations, beyond the length that the model was pretrained with."""
    rope_parameters: tuple[tuple[str, float | bool], ...] = ()
    """Settings of `rope_type` under transformers' names, such as (("factor", 4.0),)."""

    @property
    def sizes(self) -> LanguageSizes:
        """Return the sizes that a layout must fit."""
        return LanguageSizes(
            self.num_heads, self.num_kv_heads, self.head_size, self.hidden_size, self.ffn_size, self.num_layers
        )


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
