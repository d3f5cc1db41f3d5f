"""The vision tower: InternViT of both families, from a megatron-core TransformerBlock."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_r1v2.models.architecture import PixelShuffle, VisionArchitecture
from megatron_r1v2.models.layer_specs import vision_block_spec
from megatron_r1v2.models.settings import ComputeSettings


def padded_heads(architecture: VisionArchitecture, tensor_size: int) -> int:
    """Return the number of heads with the zero heads that make it a multiple of the tensor-parallel ranks."""
    return math.ceil(architecture.num_heads / tensor_size) * tensor_size


def vision_transformer_config(architecture: VisionArchitecture, settings: ComputeSettings) -> TransformerConfig:
    """Make megatron-core's configuration of the tower, which the adapter uses too."""
    heads = padded_heads(architecture, settings.tensor)
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=architecture.head_size,
        ffn_hidden_size=architecture.ffn_size,
        normalization="RMSNorm" if architecture.norm == "rms_norm" else "LayerNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        add_bias_linear=True,
        add_qkv_bias=architecture.qkv_bias,
        activation_func=F.gelu,
        gated_linear_unit=False,
        # The first stage holds the whole tower. With the language model's pipeline size, TransformerBlock would build a
        # part of its layers.
        pipeline_model_parallel_size=1,
        # Patches and class token, 1,025 tokens, do not divide by the ranks.
        sequence_parallel=False,
        **settings.shared_arguments(),
    )


class VisionTower(MegatronModule):
    """Patch embedding, learned positions and transformer layers: tiles to patch features.

    Args:
        config: from `vision_transformer_config`.
        groups: process groups; tp splits heads and MLP.
    """

    def __init__(
        self, config: TransformerConfig, architecture: VisionArchitecture, *, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.architecture = architecture
        size = architecture.hidden_size
        self.patch_embedding = nn.Conv2d(3, size, kernel_size=architecture.patch_size, stride=architecture.patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, size))
        self.position_embeddings = nn.Parameter(torch.empty(1, architecture.num_patches + 1, size))
        nn.init.normal_(self.class_token, std=config.init_method_std)
        nn.init.normal_(self.position_embeddings, std=config.init_method_std)
        self.decoder = TransformerBlock(
            config=config,
            spec=vision_block_spec(architecture),
            # InternViT has no final norm; the adapter begins with one.
            post_layer_norm=False,
            pre_process=True,
            post_process=True,
            pg_collection=groups,
        )

    def forward(self, tiles_TCHW: torch.Tensor) -> torch.Tensor:
        """Encode tiles.

        Args:
            tiles_TCHW: uint8 [T, 3, height, width].

        Returns:
            [T, patches, E]: the last layer's output without the class token, in the model's dtype.
        """
        # Tiles travel as uint8, a quarter of the bytes, and become numbers in fp32 before they are rounded once.
        mean, std = (
            torch.tensor(values, device=tiles_TCHW.device).view(1, 3, 1, 1)
            for values in (self.architecture.pixel_mean, self.architecture.pixel_std)
        )
        pixels = (tiles_TCHW.float() / 255 - mean) / std
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))
        grid = (patches.shape[2], patches.shape[3])
        hidden_TPE = patches.flatten(2).transpose(1, 2)
        hidden_TPE = torch.cat([self.class_token.expand(len(hidden_TPE), -1, -1), hidden_TPE], dim=1)
        hidden_TPE = hidden_TPE + self._positions(grid)
        hidden_PTE: torch.Tensor = self.decoder(hidden_TPE.transpose(0, 1).contiguous(), attention_mask=None)
        return hidden_PTE.transpose(0, 1)[:, 1:]

    def _positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """Return the positions for a grid of patches, resized bicubically unless it is the trained grid."""
        side = self.architecture.image_size // self.architecture.patch_size
        if grid == (side, side):
            return self.position_embeddings
        # The class token, the first position, has no place in the grid. In fp32, as transformers does.
        patches = self.position_embeddings[:, 1:].float().view(1, side, side, -1).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
        patches = patches.permute(0, 2, 3, 1).flatten(1, 2).to(self.position_embeddings.dtype)
        return torch.cat([self.position_embeddings[:, :1], patches], dim=1)


def pixel_shuffle(features_TPE: torch.Tensor, *, ratio: float, version: PixelShuffle) -> torch.Tensor:
    """Turn each square of patches into one image token, which has the channels of all.

    Args:
        features_TPE: [T, patches, E], the patches a square grid in row-major order.
        ratio: the factor of the sides (0.5: four patches become one token).
        version: v1 leaves the image transposed; v2 transposes it back.

    Returns:
        [T, F, K] with F = patches * ratio^2 and K = E / ratio^2.
    """
    tiles, patches, channels = features_TPE.shape
    side = int(patches**0.5)
    small = int(side * ratio)
    grid = features_TPE.reshape(tiles, side, small, int(channels / ratio)).permute(0, 2, 1, 3)
    grid = grid.reshape(tiles, small, small, int(channels / ratio**2))
    if version == "v2":
        grid = grid.permute(0, 2, 1, 3)
    return grid.reshape(tiles, small * small, -1)
