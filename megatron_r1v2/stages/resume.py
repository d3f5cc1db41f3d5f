"""Resuming from a checkpoint: restored state, and refusal of settings that cannot change."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1v2.checkpoint.megatron.run_folder import RECIPE_FILE
from megatron_r1v2.config.choices import OnResume
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.config.recipes import TrainingRecipe
from megatron_r1v2.data.mixture import MixtureStream
from megatron_r1v2.data.stream import PromptStream
from megatron_r1v2.resilience.fingerprint import Change, Fingerprint
from megatron_r1v2.training.policy import Policy
from megatron_r1v2.training.store import CheckpointStore

logger = logging.getLogger(__name__)

ROWS = "rows of data.train"
"""Among the contents that a checkpoint notes."""
GOAL = "evaluation.stop_at_pass_at_1"
"""The setting that ends a stage before its last step."""
_OF_VALIDATION = (
    "data.validation",
    "rows of data.validation",
    "data.max_prompt_tokens",
    "data.max_tiles",
    "data.too_long",
    "evaluation.",
    "generation.max_response_tokens",
    "generation.stop_tokens",
    "tokenizer and chat template",
)
"""The asked-for settings and contents, by how they begin, that decide what a validation measures."""


@dataclass(frozen=True)
class SettingChange:
    """A setting that differs from the checkpoint's."""

    change: Change
    rule: OnResume

    def __str__(self) -> str:
        return str(self.change)

    @property
    def is_refused(self) -> bool:
        """Return whether a run cannot go on with the new value."""
        old, new = self.change.old, self.change.new
        if self.rule is OnResume.larger:
            return not (isinstance(old, int) and isinstance(new, int) and new > old)
        return self.rule is OnResume.refused

    @property
    def moves_validation(self) -> bool:
        """Return whether a validation from here on cannot be compared with the earlier ones."""
        return self.rule is OnResume.asked and self.change.setting.startswith(_OF_VALIDATION)

    @property
    def raises_goal(self) -> bool:
        """Return whether a stage that had reached its goal has another one to reach."""
        old, new = self.change.old, self.change.new
        if self.change.setting != GOAL or not (isinstance(old, float) and isinstance(new, float)):
            return False
        return 0 < old < new


@dataclass(frozen=True)
class Restored:
    """The contents of a checkpoint beside those of policy and stream; empty for a run that starts."""

    state: Mapping[str, Any] = field(default_factory=dict)
    """The same on every rank: counters, and what the stage itself has saved."""
    replay: Sequence[Mapping[str, Any]] = ()
    """The buffer's samples of each data-parallel rank that saved."""
    changes: Sequence[SettingChange] = ()
    """Settings that are not those of the checkpoint."""
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


def compare_settings(now: TrainingRecipe, saved: TrainingRecipe) -> list[SettingChange]:
    """Return the settings of a recipe that differ from those of a checkpoint of the same stage."""
    new, old = (Fingerprint.of(**recipe.model_dump(mode="json")) for recipe in (now, saved))
    sections = now.sections()
    changes = []
    for change in new.changes_since(old):
        # A value inside a mapping (model.transformer_config.x) has the rule of the mapping.
        section, setting, *_ = change.setting.split(".")
        changes.append(SettingChange(change, sections[section].resume_rule(setting)))
    return changes


def check_settings(now: TrainingRecipe, folder: Path) -> list[SettingChange]:
    """Return the settings that differ from those of a checkpoint which the run is to go on from.

    Raises:
        ValueError: the checkpoint is of another stage, a setting cannot change, or may change only with
            checkpoint.accept_changes.
    """
    saved = load_recipe(folder / RECIPE_FILE, saved=True)
    if type(saved) is not type(now):
        raise ValueError(
            f"run.output_dir={now.run.output_dir!r} holds a run of the {saved.title()} stage ({folder.name}), and this "
            f"is {now.title()}: give it a folder of its own, with model.checkpoint={now.run.output_dir} to start from "
            "those weights"
        )
    changes = compare_settings(now, saved)
    if refused := [each.change for each in changes if each.is_refused]:
        told = "; ".join(
            f"{change.setting} was {change.old} when {folder} was saved and is {change.new} now" for change in refused
        )
        raise ValueError(
            f"{told}: put it back to resume, or set model.checkpoint to this folder and run.output_dir to a new one to "
            "start another stage from its weights"
        )
    _check_accepted(changes, now, f"these settings differ from those of {folder}")
    return changes


def check_contents(now: Fingerprint, saved: Fingerprint, recipe: TrainingRecipe, folder: Path) -> list[SettingChange]:
    """Return the files that differ from those of a checkpoint though the settings name the same ones.

    Raises:
        ValueError: they may do so only with checkpoint.accept_changes.
    """
    changes = [SettingChange(change, OnResume.asked) for change in now.changes_since(saved)]
    _check_accepted(changes, recipe, f"files have changed since {folder} was saved")
    return changes


def _check_accepted(changes: Sequence[SettingChange], recipe: TrainingRecipe, finding: str) -> None:
    asked = [str(each) for each in changes if each.rule is OnResume.asked]
    if asked and not recipe.checkpoint.accept_changes:
        raise ValueError(
            f"{finding}, and the curves would mean something else from here on: "
            f"{'; '.join(asked)}. Put them back, or set checkpoint.accept_changes=true: the changes are noted in the "
            "report then, and the buffer is emptied"
        )


def choose_checkpoint(checkpoints: CheckpointStore, resume_step: int) -> Path | None:
    """Collective over the world: choose the checkpoint to go on from.

    Args:
        resume_step: the step that is asked for; 0: the newest. Where a run has gone on from there before, it is the
            newest too: a job that is queued again has the same command.

    Raises:
        ValueError: that step has no checkpoint.
    """
    newest = checkpoints.agree_on_newest_undamaged()
    if not resume_step:
        return newest
    if newest is not None and checkpoints.newest_step() > resume_step:
        saved = load_recipe(newest / RECIPE_FILE, saved=True)
        if isinstance(saved, TrainingRecipe) and saved.checkpoint.resume_step == resume_step:
            return newest
    checkpoints.put_aside_after(resume_step)
    return checkpoints.agree_on_newest_undamaged()


def resume(
    folder: Path | None,
    policy: Policy,
    stream: PromptStream | MixtureStream,
    checkpoints: CheckpointStore,
    recipe: TrainingRecipe,
    *,
    started_from: Mapping[str, int],
    contents: Fingerprint,
) -> Restored:
    """Collective over the world: restore policy and stream.

    Args:
        folder: a finished checkpoint; None: nothing is done.
        policy: its weights, optimizer and schedule are overwritten.
        started_from: checksums by part of the weights before that.
        contents: of the files that the settings name.

    Raises:
        ValueError: see `check_settings` and `check_contents`; or the run began from other weights.
    """
    if folder is None:
        return Restored()
    # Before anything is overwritten.
    changes = check_settings(recipe, folder)
    state, replay = checkpoints.load(folder, policy.model, policy.optimizer, trained=recipe.train.parts)
    _check_start(state, started_from, recipe, folder)
    _check_architecture(state, asdict(policy.model.architecture), recipe)
    policy.version = state["version"]
    policy.scheduler.num_steps = 0  # its load_state_dict adds to this
    policy.scheduler.load_state_dict(state["scheduler"])
    policy.skipped.in_a_row = state["skipped_in_a_row"]
    taken_out = stream.load_state_dict(state["stream"])
    changes += _changed_contents(state, contents, recipe, folder, taken_out=taken_out is not None)
    if any(each.rule is OnResume.larger for each in changes):
        # It had done all of its steps, and has more now; a run that reached its goal before stays finished.
        state["finished"] = state["finished"] and state["step"] < _saved_steps(changes)
    if any(each.raises_goal for each in changes):
        state["finished"] = False  # its steps are counted besides
    if any(each.rule is OnResume.asked for each in changes):
        # Its rewards, lengths or prompts are those of the settings before.
        state = {name: value for name, value in state.items() if name != "buffer"}
        replay = []
    if any(each.moves_validation for each in changes):
        checkpoints.forget_best()
    return Restored(state, replay, changes, taken_out)


def _changed_contents(
    state: Mapping[str, Any], contents: Fingerprint, recipe: TrainingRecipe, folder: Path, *, taken_out: bool
) -> list[SettingChange]:
    if "contents" not in state:
        logger.warning("%s does not say what was in the files of its settings; they are not compared", folder)
        return []
    # What an earlier version has not noted is not compared.
    saved = {**contents.values, **state["contents"]}
    if taken_out:  # it is said by itself, and what is left cannot be told from what was there
        saved[ROWS] = contents.values[ROWS]
    return check_contents(contents, Fingerprint.of(**saved), recipe, folder)


def _saved_steps(changes: Sequence[SettingChange]) -> int:
    (steps,) = (each.change.old for each in changes if each.rule is OnResume.larger)
    assert isinstance(steps, int)
    return steps


def _check_start(
    state: Mapping[str, Any], started_from: Mapping[str, int], recipe: TrainingRecipe, folder: Path
) -> None:
    """Refuse weights to start from that are not those of the run: they are the reference of KL and MPO."""
    if "started_from" not in state:
        logger.warning("%s does not say which weights its run began from; they are not compared", folder)
        return
    differing = [part for part, value in state["started_from"].items() if started_from.get(part) != value]
    if differing:
        saved = load_recipe(folder / RECIPE_FILE, saved=True).model
        raise ValueError(
            f"the run in {recipe.run.output_dir} began from other weights ({', '.join(differing)}): "
            f"model.hf_path={saved.hf_path!r}, model.checkpoint={saved.checkpoint!r} then, "
            f"model.hf_path={recipe.model.hf_path!r}, model.checkpoint={recipe.model.checkpoint!r} now, or the files "
            "there have changed; put them back to resume, or give run.output_dir a new folder"
        )


def _check_architecture(state: Mapping[str, Any], now: Mapping[str, Any], recipe: TrainingRecipe) -> None:
    """Refuse sizes and constants of the model that are not those of the run, though the weights are the same."""
    if "base" not in state:
        return
    changes = Fingerprint.of(**now).changes_since(Fingerprint.of(**state["base"]["architecture"]))
    # What an earlier version has not noted is not compared.
    if told := "; ".join(
        f"{each.setting} was {each.old} and is {each.new}" for each in changes if each.old is not None
    ):
        raise ValueError(
            f"the run in {recipe.run.output_dir} began from another model than that of model.hf_path="
            f"{recipe.model.hf_path!r}: {told}; put the files of its folder back to resume, or give run.output_dir a "
            "new folder"
        )
