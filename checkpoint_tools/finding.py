"""What a user's path is: a Hugging Face folder, a run, a checkpoint or exported parts; and the checksum of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from checkpoint_tools.manifest import combined, in_threads, sha256, tensor_entry
from checkpoint_tools.sources import HF_IN_CHECKPOINT, PARTS_FILE, CheckpointSpec, HfSpec, Source, SourceSpec
from megatron_r1v2.models.hf_config import layout_of
from megatron_r1v2.models.hf_files import read_json
from megatron_r1v2.models.hf_headers import tensor_info
from megatron_r1v2.training.checkpoint_files import RECIPE_FILE, resolve_checkpoint


def open_any(path: Path, base: Path | None = None) -> tuple[str, SourceSpec]:
    """Find out what a user names.

    Args:
        path: a Hugging Face folder of a whole model in either layout, a run, a checkpoint, or exported parts.
        base: what it was made from, where that is needed; None: what a run's recipe names.

    Returns:
        A word for its kind, and how to open it.

    Raises:
        ValueError: it is none of these.
    """
    if (path / PARTS_FILE).is_file():
        stated = read_json(path / PARTS_FILE)
        if base is None:
            raise ValueError(f"{path} holds parts alone; give --base, the model that they belong to")
        return "parts", HfSpec(path, base, tuple(stated["parts"]), stated["layout"])
    if (path / "config.json").is_file():
        return layout_of(read_json(path / "config.json")), HfSpec(path)
    checkpoint = resolve_checkpoint(path)
    base = base or recipe_base(checkpoint)
    return "checkpoint", CheckpointSpec(checkpoint, base, only_stored=True)


def recipe_base(checkpoint: Path) -> Path | None:
    """Return the Hugging Face folder that a run started from, as its recipe names it; None: it is not there."""
    recipe = checkpoint / RECIPE_FILE
    if (checkpoint / HF_IN_CHECKPOINT / "config.json").is_file() or not recipe.is_file():
        return None
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    named = (content.get("model") or {}).get("hf_path") if isinstance(content, dict) else None
    return Path(named) if named and (Path(named) / "config.json").is_file() else None


def digest_of(source: Source, *, parts: tuple[str, ...], workers: int) -> str:
    """Return one SHA-256 of some parts of a model, whatever it is stored as.

    Args:
        source: open.
        parts: which.
        workers: threads.
    """

    def entry(ours: str) -> dict[str, Any]:
        tensor = source.parameter(ours)
        return tensor_entry(tensor_info(tensor), sha256(tensor))

    return combined(in_threads(entry, [n for n in source.names() if n.split(".")[0] in parts], workers=workers))
