"""The states of torch's generators on one rank."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


def random_states() -> dict[str, torch.Tensor]:
    """Return the current states."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(path: Path) -> None:
    """Restore the generators; a run that resumes with more ranks has no file for the new ones."""
    if not path.is_file():
        logger.warning("no random states for this rank in %s: the layout has changed", path.parent)
        return
    states = torch.load(path, weights_only=True)
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
