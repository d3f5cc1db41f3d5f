"""What lies in a checkpoint folder, for those who need no model: names, and what is beside the tensors."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from megatron_r1v2.config.schema import Part

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
        ValueError: the file is missing, damaged, or a pickle of something else.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy the checkpoint again, with all its files")
    try:
        state = torch.load(path, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {str(error)[:200]}; copy the checkpoint again") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, no state of a run; copy the checkpoint again")
    names = [part.value for part in Part]
    for key in ("parts", "trained"):
        parts = state.get(key)
        if not isinstance(parts, list) or not all(isinstance(part, str) and part in names for part in parts):
            raise ValueError(f"{path} has {key}={parts!r}; accepted: a list of {', '.join(names)}; copy it again")
    return state
