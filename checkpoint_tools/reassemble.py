"""Splice a vision tower, an optional adapter and a language model into one InternVL folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_r1v2.models.hf_components import Components, reassemble

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXAMPLE = """example:
  python -m checkpoint_tools.reassemble --vision InternViT-6B-hf --language QwQ-32B --output r1v2-start

The result is an ordinary Hugging Face folder: transformers loads it as InternVLForConditionalGeneration without remote
code, and model.hf_path of a recipe points to it. Without --adapter the adapter is random; the align stage trains it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoint_tools.reassemble",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--vision", type=Path, required=True, help="folder of internvl_vision, or of a whole internvl")
    parser.add_argument("--language", type=Path, required=True, help="folder of the language model and its tokenizer")
    parser.add_argument("--adapter", type=Path, help="folder or safetensors file with multi_modal_projector.*")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--downsample-ratio", type=float, default=0.5, help="0.5: four patches become an image token")
    parser.add_argument("--max-tiles", type=int, default=12, help="tiles an image is cut into at most (processor)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the result; needed when the components differ")
    parser.add_argument("--seed", type=int, default=0, help="of a random adapter")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    options = parser.parse_args(arguments)
    components = Components(
        vision=options.vision,
        language=options.language,
        adapter=options.adapter,
        downsample_ratio=options.downsample_ratio,
        max_tiles=options.max_tiles,
        dtype=DTYPES[options.dtype] if options.dtype else None,
        seed=options.seed,
    )
    try:
        architecture = reassemble(components, options.output, overwrite=options.overwrite)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    adapter = options.adapter or "random"
    print(f"wrote {options.output} (adapter: {adapter}, {architecture.tokens_per_tile} image tokens a tile)")


if __name__ == "__main__":
    main()
