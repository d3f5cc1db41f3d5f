"""The pretraining of the demo's vision tower, a small InternViT, on single handwritten digits.

The result is an ordinary HF folder (`internvl_vision`) of the 300M family: LayerNorm, qkv bias, no QK norm. Every
patch learns to name the digit it is part of, on augmented tiles of the training split and on thumbnails of two of
them, so that each image token carries what its place shows. Only the tower is kept, not the head that names digits.

    python -m examples.digits.make_vision_tower --output runs/digits/components/vision
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import InternVLVisionConfig, InternVLVisionModel

from examples import making
from examples.digits import pretraining, source
from megatron_r1v2.resilience.files import atomic_folder

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's, with which InternVL normalises its tiles."""


@dataclass(frozen=True)
class Settings:
    """Sizes and schedule; the defaults are those of the demo."""

    hidden_size: int = 64
    layers: int = 3
    heads: int = 4
    steps: int = 280
    batch: int = 64
    muon: float = 0.02
    adam: float = 3e-3
    seed: int = 1234


def build(settings: Settings) -> InternVLVisionModel:
    """Return a fresh tower: 32-pixel tiles, 4-pixel patches, so 16 image tokens a tile after pixel shuffle."""
    config = InternVLVisionConfig(
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=4 * settings.hidden_size,
        image_size=source.TILE,
        patch_size=4,
        attention_bias=True,
        use_qk_norm=False,
        norm_type="layer_norm",
        layer_scale_init_value=1.0,
        initializer_range=0.08,
    )
    model = InternVLVisionModel(config)
    # transformers initialises the positions with zeros, from which they learn slowly.
    nn.init.normal_(model.embeddings.position_embeddings, std=0.1)
    return model


def augment(tiles_BHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn, shear, stretch, shift and speckle grey tiles in [0, 1] (float [B, 32, 32])."""
    count = tiles_BHW.shape[0]

    def spread(size: float, *shape: int) -> torch.Tensor:
        return (torch.rand(count, *shape, generator=generator) * 2 - 1) * size

    angle, shear, stretch = spread(math.radians(14)), spread(0.15), 1 + spread(0.12, 2)
    cosine, sine = angle.cos(), angle.sin()
    rows = [
        torch.stack([cosine * stretch[:, 0], -sine + shear], 1),
        torch.stack([sine, cosine * stretch[:, 1]], 1),
    ]
    affine = torch.cat([torch.stack(rows, 1), spread(0.12, 2, 1)], 2)
    grid = F.affine_grid(affine, [count, 1, source.TILE, source.TILE], align_corners=False)
    moved = F.grid_sample(tiles_BHW[:, None], grid, align_corners=False)[:, 0]
    contrast = 1 + spread(0.2, 1, 1)
    noise = torch.randn(moved.shape, generator=generator) * 0.05
    return (moved * contrast + noise).clamp(0, 1)


def make_thumbnails(left_BHW: torch.Tensor, right_BHW: torch.Tensor) -> torch.Tensor:
    """Squeeze pairs of tiles into one tile each (float [B, 32, 32])."""
    both = torch.cat([left_BHW, right_BHW], 2)[:, None]
    size = (source.TILE, source.TILE)
    return F.interpolate(both, size, mode="bicubic", antialias=True, align_corners=False)[:, 0].clamp(0, 1)


def pixel_values(tiles_BHW: torch.Tensor) -> torch.Tensor:
    """Normalise grey tiles in [0, 1] as the model's preprocessing does with RGB ones (float [B, 3, 32, 32])."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (tiles_BHW[:, None].expand(-1, 3, -1, -1) - mean) / std


def patch_labels(left_B: torch.Tensor, right_B: torch.Tensor, side: int) -> torch.Tensor:
    """Return the digit under each patch (int64 [B, side * side]): the left one in the left half of the columns."""
    columns = torch.arange(side) < side // 2
    row = torch.where(columns, left_B[:, None], right_B[:, None])
    return row[:, None].expand(-1, side, -1).flatten(1)


def patch_logits(model: InternVLVisionModel, head: nn.Module, tiles_BHW: torch.Tensor) -> torch.Tensor:
    """Return the logits of the digit that each patch is part of (float [B, patches, 10])."""
    logits_BPD: torch.Tensor = head(model(pixel_values=pixel_values(tiles_BHW)).last_hidden_state[:, 1:])
    return logits_BPD


def train(settings: Settings) -> tuple[InternVLVisionModel, nn.Module]:
    """Pretrain a tower on the training split; return it with the head that names digits."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    tiles, labels = load_split("train")
    model = build(settings)
    head = nn.Linear(settings.hidden_size, 10)
    both = nn.ModuleList([model, head])
    optimizers = pretraining.Optimizers(both, muon=settings.muon, adam=settings.adam, steps=settings.steps)
    progress = pretraining.Progress("vision tower", settings.steps)
    side = source.TILE // model.config.patch_size[0]
    # Part of each batch are thumbnails: the tower must read digits at half their width too.
    squeezed = settings.batch // 4
    for step in range(settings.steps):
        chosen = torch.randint(len(tiles), (settings.batch + squeezed,), generator=generator)
        batch = augment(tiles[chosen], generator)
        left, right = labels[chosen[: settings.batch]], labels[chosen[: settings.batch]].clone()
        right[:squeezed] = labels[chosen[settings.batch :]]
        thumbnails = make_thumbnails(batch[:squeezed], batch[settings.batch :])
        inputs = torch.cat([thumbnails, batch[squeezed : settings.batch]])
        logits = patch_logits(model, head, inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), patch_labels(left, right, side).flatten(), label_smoothing=0.1)
        progress.show(step + 1, optimizers.update(loss, step))
    return model, head


def load_split(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tiles of one split in [0, 1] (float [B, 32, 32]) and their digits (int64 [B])."""
    tiles, labels = source.digit_tiles()
    indices = source.split_indices()[name]
    return torch.from_numpy(tiles[indices]).float() / 255, torch.from_numpy(labels[indices])


@torch.inference_mode()
def accuracy(model: InternVLVisionModel, head: nn.Module, tiles_BHW: torch.Tensor, labels_B: torch.Tensor) -> float:
    """Return the fraction of tiles whose patches together name the right digit."""
    votes = patch_logits(model, head, tiles_BHW).log_softmax(-1).mean(1)
    return (votes.argmax(-1) == labels_B).float().mean().item()


HELPS = {"steps": "optimizer steps", "hidden_size": "width", "layers": "depth", "seed": "decides weights and batches"}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    transformers.utils.logging.disable_progress_bar()
    parser = making.maker_parser(
        "examples.digits.make_vision_tower", __doc__, output="HF folder to make; left alone if it exists"
    )
    making.add_settings(parser, Settings(), HELPS)
    options = parser.parse_args(arguments)
    if making.report_if_made("vision tower", options.output):
        return
    model, head = train(making.chosen_settings(options, Settings()))
    with atomic_folder(options.output, replace=True) as folder:
        model.save_pretrained(folder)
    validation = accuracy(model.eval(), head, *load_split("validation"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"vision tower: {options.output}: {parameters:,} parameters, validation accuracy {validation:.3f}")


if __name__ == "__main__":
    main()
