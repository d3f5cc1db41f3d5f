"""The folder of a checkpoint without its tensors: names, and the state of the run."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_r1v2.config.choices import Part
from megatron_r1v2.config.validate import download_hint
from megatron_r1v2.resilience.files import atomic_file

STATE_FILE = "state.pt"
RECIPE_FILE = "recipe.yaml"
TENSORS = "tensors"
HF_IN_CHECKPOINT = "hf"
"""Folder in a checkpoint that our converter wrote: config.json, tokenizer and processor of the model."""
STATE_FORMAT = 1
STEP_FOLDER = re.compile(r"step-(\d{8})$")


def finished_checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints below a folder, oldest first."""
    if not folder.is_dir():
        return []
    # The eight digits of each name make their order that of the steps.
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
        f"or in its checkpoints/{'' if folder.exists() else f'; it does not exist{download_hint(path)}'}"
    )


def save_state(folder: Path, state: Mapping[str, object]) -> None:
    """Write the state of a run (step, parts, counters) beside the tensors of its checkpoint."""
    with atomic_file(folder / STATE_FILE) as file:
        torch.save({"format": STATE_FORMAT, **state}, file)


def load_state(folder: Path) -> dict[str, Any]:
    """Return the state of a run that `save_state` wrote.

    Raises:
        ValueError: the file is missing, damaged, of another format, or a pickle of something else.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy the checkpoint again, with all its files")
    try:
        # Tensors and plain values only: a pickle of other origin could run anything.
        state = torch.load(path, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {str(error)[:200]}; copy the checkpoint again") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, no state of a run; copy the checkpoint again")
    if "format" not in state:
        raise ValueError(
            f"{path} was written by an earlier development version of this program, whose checkpoints are not read any "
            "more; train again, or convert the model again"
        )
    if state["format"] != STATE_FORMAT:
        raise ValueError(f"{path} has format {state['format']!r}; accepted: {STATE_FORMAT}; update megatron_r1v2")
    names = [part.value for part in Part]
    for key in ("parts", "trained"):
        parts = state.get(key)
        if not isinstance(parts, list) or not all(isinstance(part, str) and part in names for part in parts):
            raise ValueError(f"{path} has {key}={parts!r}; accepted: a list of {', '.join(names)}; copy it again")
    return state
