"""A running stage: what its parts decide, when it saves, and in which order it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1v2.checkpoint.megatron.run_folder import finished_checkpoints
from megatron_r1v2.config.schema import Part
from megatron_r1v2.stages.align import supervised_step
from megatron_r1v2.stages.session import open_session
from tests.stages.runs import recipe_for


@pytest.mark.parametrize(
    ("parts", "text", "cached"),
    [("[adapter]", False, True), ("[language]", True, True), ("[vision]", False, False)],
)
def test_what_trains_decides_on_text_prompts_and_cached_features(
    root: Path, tmp_path: Path, parts: str, text: bool, cached: bool
) -> None:
    recipe = recipe_for(root, tmp_path / "run", (f"train.parts={parts}",))
    with open_session(recipe, stage="grpo", shown=()) as session:
        assert session.trains_text is text
        assert (session.policy.features is not None) is cached
        trained = {name.split(".")[0] for name, p in session.model.named_parameters() if p.requires_grad}
        assert trained == {Part(part).value for part in session.parts}


@pytest.mark.parametrize(
    ("every", "step", "last", "saved"),
    [(2, 4, False, True), (2, 3, False, False), (0, 4, False, False), (0, 3, True, True)],
)
def test_when_a_step_is_saved(root: Path, tmp_path: Path, every: int, step: int, last: bool, saved: bool) -> None:
    with open_session(recipe_for(root, tmp_path / "run"), stage="grpo", shown=()) as session:
        checkpoint = session.recipe.checkpoint.changed(every_steps=every)
        session.recipe = session.recipe.changed(checkpoint=checkpoint)
        session.step = step
        assert session.should_save(last=last) is saved


def test_a_checkpoint_has_its_name_after_the_numbers_of_its_step_are_written(root: Path, tmp_path: Path) -> None:
    """A run that dies between the two does the step again; the other way round its line would be missing for ever."""
    run = tmp_path / "run"
    with open_session(recipe_for(root, run), stage="align", shown=()) as session:
        supervised_step(session)
        session.save({}, {})
        in_the_way = run / "metrics.jsonl"
        in_the_way.mkdir()
        with pytest.raises(IsADirectoryError):
            session.end_step()
        assert finished_checkpoints(run / "checkpoints") == []
        in_the_way.rmdir()
