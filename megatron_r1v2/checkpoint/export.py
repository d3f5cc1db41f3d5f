"""A checkpoint of a run as a Hugging Face folder, with the parts that were not trained from the base."""

from __future__ import annotations

from pathlib import Path

from megatron_r1v2.checkpoint.base_model import check_base, recipe_base
from megatron_r1v2.checkpoint.conversion import RunOptions
from megatron_r1v2.checkpoint.destinations import HfConversion, HfFormat, write_hf
from megatron_r1v2.checkpoint.hf.config import folder_layout
from megatron_r1v2.checkpoint.hf.folders import DEFAULT_SHARD_BYTES
from megatron_r1v2.checkpoint.hf.mapping import Layout
from megatron_r1v2.checkpoint.megatron.run_folder import HF_IN_CHECKPOINT, resolve_checkpoint
from megatron_r1v2.checkpoint.model_card import model_card
from megatron_r1v2.checkpoint.sources import CheckpointSpec


def export_checkpoint(
    path: Path,
    output: Path,
    *,
    base: Path | None = None,
    layout: Layout | None = None,
    dtype: str = "",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    options: RunOptions,
) -> str:
    """Write a checkpoint as a Hugging Face folder, and return words for the origin of its parts.

    Args:
        path: a run (its newest checkpoint) or a checkpoint.
        base: Hugging Face folder that the run started from; None: the one that its recipe names, where it exists.
        layout: of the output; None: that of the base.
        dtype: a key of DTYPES; empty: that of the checkpoint.

    Raises:
        ValueError: parts are missing, or the base is not the model that the run was trained on.
    """
    checkpoint = resolve_checkpoint(path)
    base = base or recipe_base(checkpoint)
    companions = base or checkpoint / HF_IN_CHECKPOINT
    spec = CheckpointSpec(checkpoint, base)
    with spec.open() as source:  # names what is missing before config.json is looked at
        state, tokens_per_tile = source.state, source.architecture.tokens_per_tile
    if base is not None:
        check_base(base, checkpoint, state, workers=options.workers or 2)
    form = HfFormat(layout or folder_layout(companions), dtype, max_shard_bytes)
    conversion = HfConversion(spec, (checkpoint, *([base] if base else [])), form)
    card = model_card(checkpoint, state, base=base, layout=form.layout, tokens_per_tile=tokens_per_tile)
    write_hf(conversion, output, companions=companions, options=options, card=card)
    rest = f", the rest from {base}" if base else ""
    return f"{', '.join(state['parts'])} from {checkpoint}{rest}"
