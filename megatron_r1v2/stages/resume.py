"""Resuming from a checkpoint: restored state, and refusal of settings that cannot change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1v2.checkpoint.megatron.run_folder import RECIPE_FILE
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.config.schema import TrainConfig
from megatron_r1v2.data.stream import PromptStream
from megatron_r1v2.resilience.fingerprint import Fingerprint
from megatron_r1v2.training.policy import Policy
from megatron_r1v2.training.store import CheckpointStore

_SCHEDULE = (
    "steps",
    "updates_per_step",
    "learning_rate",
    "min_learning_rate",
    "warmup_steps",
    "weight_decay",
    "adam_beta2",
)


@dataclass(frozen=True)
class Restored:
    """The contents of a checkpoint beside those of policy and stream; empty for a run that starts."""

    state: Mapping[str, Any] = field(default_factory=dict)
    """The same on every rank: counters, and what the stage itself has saved."""
    replay: Sequence[Mapping[str, Any]] = ()
    """The buffer's samples of each data-parallel rank that saved."""
    taken_out: str | None = None
    """A sentence where samples were taken out of the data set since."""

    @property
    def step(self) -> int:
        """Return the steps done."""
        return int(self.state.get("step", 0))

    @property
    def finished(self) -> bool:
        """Return whether the stage had reached its goal."""
        return bool(self.state.get("finished", False))

    @property
    def checksums(self) -> Mapping[str, int]:
        """Return the checksums of the weights when they were saved, by part."""
        checksums: Mapping[str, int] = self.state.get("checksums", {})
        return checksums


def resume(
    folder: Path | None, policy: Policy, stream: PromptStream, checkpoints: CheckpointStore, settings: TrainConfig
) -> Restored:
    """Collective over the world: restore policy and stream.

    Args:
        folder: a finished checkpoint; None: nothing is done.
        policy: its weights, optimizer and schedule are overwritten.

    Raises:
        ValueError: settings that live on in the optimizer's state have changed.
    """
    if folder is None:
        return Restored()
    # Before anything is overwritten.
    _check_schedule(settings, load_recipe(folder / RECIPE_FILE, saved=True).train, folder)
    state, replay = checkpoints.load(folder, policy.model, policy.optimizer, trained=settings.parts)
    policy.version = state["version"]
    policy.scheduler.num_steps = 0  # its load_state_dict adds to this
    policy.scheduler.load_state_dict(state["scheduler"])
    policy.skipped.in_a_row = state["skipped_in_a_row"]
    return Restored(state, replay, taken_out=stream.load_state_dict(state["stream"]))


def _check_schedule(now: TrainConfig, saved: TrainConfig, folder: Path) -> None:
    """Refuse to resume with settings that live on in the optimizer's state, where a change would have no effect."""
    now_fingerprint, saved_fingerprint = (
        Fingerprint.of(train={name: getattr(settings, name) for name in _SCHEDULE}) for settings in (now, saved)
    )
    for change in now_fingerprint.changes_since(saved_fingerprint):
        raise ValueError(
            f"{change.setting} was {change.old} when {folder} was saved and is {change.new} now; put "
            "it back to resume, or set model.checkpoint to this folder and run.output_dir to a new one to start "
            "another stage from its weights"
        )
