"""Turn a checkpoint of a run into a Hugging Face folder that is complete: weights, config, tokenizer, processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from checkpoint_tools.command_line import (
    INTERRUPTED,
    add_hf_arguments,
    add_run_arguments,
    explained_errors,
    parser_of,
    run_options,
)
from megatron_r1v2.checkpoint.destinations import HfJob, write_hf
from megatron_r1v2.checkpoint.detection import check_base, recipe_base
from megatron_r1v2.checkpoint.hf.config import layout_of
from megatron_r1v2.checkpoint.hf.folders import read_json
from megatron_r1v2.checkpoint.megatron.run_folder import resolve_checkpoint
from megatron_r1v2.checkpoint.sources import HF_IN_CHECKPOINT, CheckpointSpec

EXAMPLE = f"""example:
  python -m checkpoint_tools.megatron_to_hf --checkpoint runs/digits-grpo --base base-model --output export
  python -m checkpoint_tools.megatron_to_hf --checkpoint runs/r1v2 --base r1v2-38b --layout chat --output for-vllm

A checkpoint of a run holds the parts that were trained. The others, config.json, tokenizer and processor come from
--base: the folder that the run started from; default: model.hf_path of its recipe, where that folder is there. A
checkpoint that hf_to_megatron made needs none.
A base that is not the model that the run was trained on is refused, by the checksums that training noted of it.
The padding of vocabulary and heads, which depends on the layout of the run, is cut off.
{INTERRUPTED}"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = parser_of("megatron_to_hf", __doc__, EXAMPLE)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run (its newest checkpoint) or a checkpoint")
    parser.add_argument("--base", type=Path, help="Hugging Face folder that the run started from, in either layout")
    add_run_arguments(parser)
    add_hf_arguments(parser, default=None)
    options = parser.parse_args(arguments)
    with explained_errors(parser):
        checkpoint = resolve_checkpoint(options.checkpoint)
        base = options.base or recipe_base(checkpoint)
        companions = base or checkpoint / HF_IN_CHECKPOINT
        spec = CheckpointSpec(checkpoint, base)
        with spec.open() as source:  # says what is missing before config.json is looked at
            state = source.state
        if base is not None:
            check_base(base, checkpoint, state, workers=options.workers or 2)
        job = HfJob(
            spec,
            options.layout or layout_of(read_json(companions / "config.json")),
            (checkpoint, *([base] if base else [])),
            dtype=options.dtype or "",
            max_shard_bytes=options.shard_size,
        )
        write_hf(job, options.output, companions=companions, options=run_options(options))
        named = ", ".join(state["parts"])
        rest = f", the rest from {base}" if base else ""
        print(f"wrote {options.output} ({named} from {checkpoint}{rest})")


if __name__ == "__main__":
    main()
