"""The kind of checkpoint at a path: a Hugging Face folder, a run, a checkpoint or exported parts."""

from __future__ import annotations

from pathlib import Path

from megatron_r1v2.checkpoint.base_model import recipe_base
from megatron_r1v2.checkpoint.hf.config import folder_layout
from megatron_r1v2.checkpoint.hf.refusals import check_folder
from megatron_r1v2.checkpoint.megatron.run_folder import resolve_checkpoint
from megatron_r1v2.checkpoint.sources import CheckpointSpec, HfSpec, SourceSpec
from megatron_r1v2.checkpoint.trained_parts import PARTS_FILE, read_parts


def open_checkpoint(path: Path, base: Path | None = None) -> tuple[str, SourceSpec]:
    """Return a word for the kind of checkpoint at a path, and the way to open it.

    Args:
        base: the model that it was made from, where that is needed; None: the one that a run's recipe names.

    Raises:
        ValueError: the path names none of these.
    """
    check_folder(path)
    if (path / PARTS_FILE).is_file():
        described = read_parts(path)
        if base is None:
            raise ValueError(f"{path} holds parts alone; give --base, the model that they belong to")
        return "parts", HfSpec(path, base, described.parts, described.layout)
    if (path / "config.json").is_file():
        return folder_layout(path), HfSpec(path)
    checkpoint = resolve_checkpoint(path)
    base = base or recipe_base(checkpoint)
    return "checkpoint", CheckpointSpec(checkpoint, base, only_stored=True)
