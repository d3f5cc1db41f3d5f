"""Splice a vision tower, an optional adapter and a language model into one Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_r1v2.checkpoint import command_line
from megatron_r1v2.checkpoint.destinations import DTYPES
from megatron_r1v2.checkpoint.hf.companions import DEFAULT_MAX_TILES, Components
from megatron_r1v2.checkpoint.splicing import reassemble

EXAMPLE = f"""example:
  python -m checkpoint_tools.reassemble --vision InternViT-6B-448px-V2_5 --language QwQ-32B --output r1v2-start

The tower may be as OpenGVLab published it or as transformers saves it, or that of a whole model. The result is an
ordinary Hugging Face folder: transformers loads it as InternVLForConditionalGeneration without remote code, and
model.hf_path of a recipe points to it. Image tokens that the tokenizer lacks are added; the embedding grows only if
they do not fit into it, by rows that are the mean of the others. Without --adapter the adapter is random; the align
stage trains it.
{command_line.INTERRUPTED}"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = command_line.tool_parser("reassemble", __doc__, EXAMPLE)
    parser.add_argument("--vision", type=Path, required=True, help="folder of an InternViT, or of a whole InternVL")
    parser.add_argument("--language", type=Path, required=True, help="folder of the language model and its tokenizer")
    parser.add_argument("--adapter", type=Path, help="folder or file with multi_modal_projector.* or mlp1.*")
    parser.add_argument("--downsample-ratio", type=float, default=0.5, help="0.5: four patches become an image token")
    parser.add_argument("--pixel-shuffle", choices=("v1", "v2"), help="default: the adapter's own; random: v2")
    parser.add_argument(
        "--max-tiles", type=int, default=DEFAULT_MAX_TILES, help="tiles an image is cut into at most (processor)"
    )
    parser.add_argument(
        "--untie-embeddings", action="store_true", help="write a tied embedding as output matrix too, to train apart"
    )
    parser.add_argument("--seed", type=int, default=0, help="of a random adapter")
    command_line.add_run_arguments(parser)
    command_line.add_hf_arguments(parser, default="transformers")
    options = parser.parse_args(arguments)
    components = Components(
        vision=options.vision,
        language=options.language,
        adapter=options.adapter,
        downsample_ratio=options.downsample_ratio,
        pixel_shuffle=options.pixel_shuffle,
        max_tiles=options.max_tiles,
        dtype=DTYPES[options.dtype] if options.dtype else None,
        seed=options.seed,
        untie_embeddings=options.untie_embeddings,
    )
    with command_line.explained_errors(parser):
        architecture = reassemble(
            components,
            options.output,
            layout=options.layout,
            max_shard_bytes=options.shard_size,
            options=command_line.run_options(options),
        )
        adapter = options.adapter or "random"
        print(f"wrote {options.output} (adapter: {adapter}, {architecture.tokens_per_tile} image tokens a tile)")


if __name__ == "__main__":
    main()
