"""What lies in a checkpoint folder, for those who need no model: names, and what is beside the tensors."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

STATE_FILE = "state.pt"
RECIPE_FILE = "recipe.yaml"
TENSORS = "tensors"
STEP_FOLDER = re.compile(r"step-(\d{8})$")


def finished_checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints below a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if STEP_FOLDER.match(path.name))


def resolve_checkpoint(path: str | Path) -> Path:
    """Turn what a user names (a checkpoint, a run, its checkpoints folder) into a checkpoint folder.

    Raises:
        ValueError: nothing finished is there.
    """
    folder = Path(path)
    if (folder / TENSORS / "metadata.json").is_file():
        return folder
    for candidate in (folder, folder / "checkpoints"):
        finished = finished_checkpoints(candidate)
        if finished:
            return finished[-1]
    raise ValueError(
        f"no finished checkpoint in {folder}; expected tensors/metadata.json in it, or step-NNNNNNNN folders in it "
        "or in its checkpoints/"
    )


def load_state(folder: Path) -> dict[str, Any]:
    """Return what is beside the tensors of a checkpoint: step, parts, counters.

    Raises:
        ValueError: the file is damaged, or a pickle of something else.
    """
    try:
        return torch.load(folder / STATE_FILE, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"{folder / STATE_FILE} cannot be read: {str(error)[:200]}; copy the checkpoint again"
        ) from error
