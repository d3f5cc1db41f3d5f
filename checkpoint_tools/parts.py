"""Take the trained parts of a run out of its checkpoint, and put them over the model that they were trained on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from checkpoint_tools.command_line import add_hf_arguments, add_run_arguments, explained_errors, parser_of, run_options
from megatron_r1v2.checkpoint.conversion import run_job
from megatron_r1v2.checkpoint.destinations import HfJob, finish_hf, write_hf
from megatron_r1v2.checkpoint.detection import ALL_PARTS, PARTS_VERSION, check_base, digest_of, read_parts, recipe_base
from megatron_r1v2.checkpoint.hf.config import layout_of
from megatron_r1v2.checkpoint.hf.folders import read_json, write_json
from megatron_r1v2.checkpoint.megatron.run_folder import load_state, resolve_checkpoint
from megatron_r1v2.checkpoint.sources import PARTS_FILE, CheckpointSpec, HfSpec, OverSpec

EXAMPLE = """example:
  python -m checkpoint_tools.parts export --checkpoint runs/r1v2 --output r1v2-adapter
  python -m checkpoint_tools.parts apply --parts r1v2-adapter --base r1v2-38b --output r1v2-trained

A run that trains the adapter changes 184 MB of 77 GB: the rest needs no second copy. `export` writes the parts under
their Hugging Face names, with a checksum of the architecture and all other weights of the model that the run started
from, after it was held against what training noted of them; `apply` computes that checksum of its --base, in whatever
layout it is, and refuses another model (reading all of it takes a while).
reassemble --adapter takes exported adapters too."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = parser_of("parts", __doc__, EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write the trained parts of a run")
    export.add_argument("--checkpoint", type=Path, required=True, help="a run (its newest checkpoint) or a checkpoint")
    export.add_argument(
        "--base", type=Path, help="model that the run started from; default: its recipe's model.hf_path"
    )
    add_run_arguments(export)
    apply = commands.add_parser("apply", help="write the whole model, the parts over a base")
    apply.add_argument("--parts", type=Path, required=True, help="folder that export made")
    apply.add_argument("--base", type=Path, required=True, help="the model that the parts were trained on")
    add_run_arguments(apply)
    add_hf_arguments(apply, default=None)
    options = parser.parse_args(arguments)
    with explained_errors(parser):
        if options.command == "export":
            export_parts(options)
        else:
            apply_parts(options)


def export_parts(options: argparse.Namespace) -> None:
    """Write the trained parts alone."""
    checkpoint = resolve_checkpoint(options.checkpoint)
    base = options.base or recipe_base(checkpoint)
    if base is None:
        raise ValueError(f"{checkpoint} does not say which model it started from, or that is gone; give --base")
    state = load_state(checkpoint)
    parts = tuple(str(part) for part in state["parts"])
    check_base(base, checkpoint, state, workers=options.workers or 2)
    layout = layout_of(read_json(base / "config.json"))
    spec = CheckpointSpec(checkpoint, base, only_stored=True)
    job = HfJob(spec, layout, (checkpoint, base), dtype=options.dtype or "", parts=parts)
    stated = {"version": PARTS_VERSION, "parts": list(parts), "layout": layout, "step": int(state["step"])}
    stated["base_sha256"] = _digest_of_rest(base, parts, workers=options.workers)
    run_job(
        job,
        options.output,
        run_options(options),
        finish_hf(layout, lambda folder, _: write_json(folder / PARTS_FILE, stated)),
    )
    print(f"wrote {options.output} ({', '.join(parts)} after step {stated['step']}, trained on {base})")


def apply_parts(options: argparse.Namespace) -> None:
    """Write a whole model."""
    stated = read_parts(options.parts)
    parts = tuple(stated["parts"])
    found = _digest_of_rest(options.base, parts, workers=options.workers)
    if found != stated["base_sha256"]:
        raise ValueError(
            f"{options.base} is not the model that {options.parts} was trained on: the checksum of its architecture "
            f"and weights (without {', '.join(parts)}) is {found[:12]}, that of the model trained on "
            f"{stated['base_sha256'][:12]}; "
            "a model of the same weights in another dtype is another model too"
        )
    top = HfSpec(options.parts, options.base, parts, stated["layout"])
    job = HfJob(
        OverSpec(options.base, top),
        options.layout or layout_of(read_json(options.base / "config.json")),
        (options.base, options.parts),
        dtype=options.dtype or "",
        max_shard_bytes=options.shard_size,
    )
    write_hf(job, options.output, companions=options.base, options=run_options(options))
    print(f"wrote {options.output} ({', '.join(parts)} from {options.parts}, the rest from {options.base})")


def _digest_of_rest(base: Path, parts: tuple[str, ...], *, workers: int) -> str:
    """Return the checksum of the parts that were not trained."""
    rest = tuple(part for part in ALL_PARTS if part not in parts)
    with HfSpec(base).open() as source:
        return digest_of(source, parts=rest, workers=workers or 2)


if __name__ == "__main__":
    main()
