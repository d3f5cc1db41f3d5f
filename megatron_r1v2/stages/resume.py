"""Going on from a checkpoint: what is restored, and what may not have changed since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.config.schema import RunRecipe, TrainConfig
from megatron_r1v2.data.stream import PromptStream
from megatron_r1v2.training.policy import Policy
from megatron_r1v2.training.store import RECIPE_FILE, CheckpointStore

_SCHEDULE = (
    "steps",
    "updates_per_step",
    "learning_rate",
    "min_learning_rate",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
)


def resume(
    folder: Path | None, policy: Policy, stream: PromptStream, checkpoints: CheckpointStore, recipe: RunRecipe
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Restore policy and stream.

    Args:
        folder: a finished checkpoint; None: there is none, and nothing is done.
        policy: its weights, optimizer and schedule are overwritten.
        stream: goes on where it was.
        checkpoints: the run's.
        recipe: the settings of now.

    Returns:
        What the checkpoint holds beside, and the buffer's samples of each data-parallel rank that saved it.

    Raises:
        ValueError: settings that live on in the optimizer's state have changed.
    """
    if folder is None:
        return {}, []
    _check_schedule(recipe.train, load_recipe(folder / RECIPE_FILE).train, folder)
    state, replay = checkpoints.load(folder, policy.model, policy.optimizer, trained=recipe.train.parts)
    policy.version = state["version"]
    policy.scheduler.num_steps = 0  # its load_state_dict adds to this
    policy.scheduler.load_state_dict(state["scheduler"])
    policy.skipped.in_a_row = state["skipped_in_a_row"]
    stream.load_state_dict(state["stream"])
    return state, replay


def _check_schedule(now: TrainConfig, saved: TrainConfig, folder: Path) -> None:
    """Refuse to resume with settings that live on in the optimizer's state, where a change would have no effect."""
    for name in _SCHEDULE:
        if getattr(now, name) != getattr(saved, name):
            raise ValueError(
                f"train.{name} was {getattr(saved, name)} when {folder} was saved and is {getattr(now, name)} now; put "
                "it back to resume, or set model.checkpoint to this folder and run.output_dir to a new one to start "
                "another stage from its weights"
            )
