"""A first adapter, fitted in one solve: every image token becomes roughly the embedding of the word for its picture.

The outputs of a random adapter mean nothing to the language model, and training one from there takes far more steps
than an example has. R1V2 starts from a pretrained adapter too. Here the first matrix stays random, and the second is
the ridge regression of the words' embeddings on the hidden features of the first. It does not teach the language model
to answer: the align stage does.

    python -m examples.real_weights.make_adapter --vision runs/real_weights/components/vision \\
        --language runs/real_weights/components/language --rows runs/real_weights/data/align.jsonl \\
        --output runs/real_weights/components/adapter
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, InternVLVisionModel, PreTrainedTokenizerFast

from examples import making
from megatron_r1v2.checkpoint.hf.architecture import vision_architecture
from megatron_r1v2.checkpoint.hf.folders import SINGLE_NAME, SafetensorsFolder
from megatron_r1v2.models.vision import pixel_shuffle
from megatron_r1v2.resilience.files import atomic_folder

PICTURES = 480
BATCH = 32
RIDGE = 0.1
"""Added to the variance of every hidden channel, per thousand."""
STANDARD_DEVIATION = 0.02
"""Standard deviation of the random matrix, as transformers initialises it."""
_NAME = "multi_modal_projector."


@torch.no_grad()
def image_features(vision: Path, pictures: Sequence[Path]) -> torch.Tensor:
    """Return the adapter's inputs for pictures (float [T, F, K])."""
    tower = InternVLVisionModel.from_pretrained(vision).eval()
    architecture = vision_architecture(tower.config.to_dict())
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (architecture.pixel_mean, architecture.pixel_std))
    features = []
    for start in range(0, len(pictures), BATCH):
        tiles = [numpy.array(Image.open(path).convert("RGB")) for path in pictures[start : start + BATCH]]
        pixels_TCHW = torch.from_numpy(numpy.stack(tiles)).permute(0, 3, 1, 2).float() / 255
        hidden_TPE = tower(pixel_values=(pixels_TCHW - mean) / std).last_hidden_state[:, 1:]
        features.append(pixel_shuffle(hidden_TPE, ratio=0.5, version="v2"))
    return torch.cat(features)


def word_embeddings(language: Path, words: Sequence[str]) -> torch.Tensor:
    """Return the mean embedding of the tokens of each word, written as inside a sentence (float [words, H])."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(language)
    with SafetensorsFolder(language) as folder:
        embedding_VH = folder.tensor("model.embed_tokens.weight").float()
    # A space before a digit would be a token of its own, without meaning.
    ids = [tokenizer.encode(word if word.isdigit() else f" {word}", add_special_tokens=False) for word in words]
    return torch.stack([embedding_VH[of_word].mean(0) for of_word in ids])


def fit(features_TFK: torch.Tensor, targets_TH: torch.Tensor, *, seed: int) -> dict[str, torch.Tensor]:
    """Fit an adapter.

    Args:
        features_TFK: [T, F, K], image features.
        targets_TH: [T, H], the wanted value of every image token of a picture.
        seed: of the random matrix.

    Returns:
        Its parameters by Hugging Face's names.
    """
    size, width = features_TFK.shape[-1], targets_TH.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    first_HK = STANDARD_DEVIATION * torch.randn(width, size, generator=generator)
    inputs = F.layer_norm(features_TFK, (size,)).flatten(0, 1)
    # In float64, because normal equations square the condition of the features.
    hidden = F.gelu(inputs @ first_HK.T).double()
    targets = targets_TH.double().repeat_interleave(features_TFK.shape[1], dim=0)
    mean_hidden, mean_target = hidden.mean(0), targets.mean(0)
    # Centred, so that the bias carries the means and the penalty acts on the matrix alone.
    centred = hidden - mean_hidden
    penalty = RIDGE / 1000 * len(centred) * torch.eye(width, dtype=torch.float64)
    second_HH = torch.linalg.solve(centred.T @ centred + penalty, centred.T @ (targets - mean_target)).T
    return {
        f"{_NAME}layer_norm.weight": torch.ones(size),
        f"{_NAME}layer_norm.bias": torch.zeros(size),
        f"{_NAME}linear_1.weight": first_HK,
        f"{_NAME}linear_1.bias": torch.zeros(width),
        f"{_NAME}linear_2.weight": second_HH.float(),
        f"{_NAME}linear_2.bias": (mean_target - second_HH @ mean_hidden).float(),
    }


def make_adapter(
    vision: Path, language: Path, rows: Sequence[Mapping[str, Any]], images: Path, *, seed: int
) -> dict[str, torch.Tensor]:
    """Fit an adapter to pictures with answers.

    Args:
        vision: component.
        language: component.
        rows: questions with one picture each.
        images: folder of the pictures.
        seed: of the random matrix.

    Returns:
        Its parameters by Hugging Face's names.
    """
    features_TFK = image_features(vision, [images / row["images"][0] for row in rows])
    words = sorted({row["answer"] for row in rows})
    embeddings = word_embeddings(language, words)
    targets_TH = embeddings[[words.index(row["answer"]) for row in rows]]
    return fit(features_TFK, targets_TH, seed=seed)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = making.maker_parser("examples.real_weights.make_adapter", __doc__, output="folder to make")
    parser.add_argument("--vision", type=Path, required=True, help="component")
    parser.add_argument("--language", type=Path, required=True, help="component")
    parser.add_argument(
        "--rows", type=Path, required=True, help="JSONL of make_data; its pictures are in images/ beside it"
    )
    parser.add_argument("--pictures", type=int, default=PICTURES, help="how many, from the start (%(default)s)")
    parser.add_argument("--seed", type=int, default=making.SEED, help="of the random matrix (%(default)s)")
    options = parser.parse_args(arguments)
    lines = options.rows.read_text(encoding="utf-8").splitlines()[: options.pictures]
    rows = [json.loads(line) for line in lines]
    adapter = make_adapter(options.vision, options.language, rows, options.rows.parent / "images", seed=options.seed)
    with atomic_folder(options.output, replace=True) as folder:
        save_file(adapter, folder / SINGLE_NAME, metadata={"format": "pt"})
    print(f"adapter: {options.output}: fitted to {len(rows)} pictures")


if __name__ == "__main__":
    main()
