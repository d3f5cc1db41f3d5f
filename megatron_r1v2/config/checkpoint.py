"""The settings of saving, resuming and being interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RANGES: Mapping[str, tuple[float | None, float | None]] = {
    "checkpoint.every_steps": (0, None),
    "checkpoint.keep_last": (1, None),
    "checkpoint.lead_seconds": (0, None),
    "checkpoint.grace_seconds": (1, None),
}
"""Inclusive bounds; None: no bound on that side."""


@dataclass
class CheckpointConfig:
    """Saving and resuming; checkpoints are below `run.output_dir`/checkpoints."""

    every_steps: int = 10
    """Also saved at the end of the stage, and when validation Pass@1 is the best so far; 0: only then. SIGTERM costs
    the step in progress and those since the newest checkpoint, less what `keep_rollouts` keeps of them: 1 where a
    checkpoint is small against a step."""
    keep_last: int = 2
    """Older checkpoints are deleted, but for the one with the best validation Pass@1 (evaluation.every_steps)."""
    asynchronous: bool = True
    """Write in the background."""
    resume: bool = True
    """Continue from the newest checkpoint in the folder that is not damaged, if there is one. At the same layout with
    the same bits; at another number of replicas, TP or PP with the same data order and buffer, equal to rounding."""
    keep_rollouts: bool = True
    """Keep the finished rollouts of a step on disk until a checkpoint holds the step: one that is interrupted does not
    generate them again. They are the same tokens; the engine's log-probs of the rest may differ in the last bits, since
    they are generated in smaller batches."""
    lead_seconds: float = 1200.0
    """SIGUSR1 comes so long before the end (--signal of the sbatch script): a step and a save must fit in."""
    grace_seconds: float = 25.0
    """After SIGTERM the step is abandoned, and the process ends within so many seconds."""
