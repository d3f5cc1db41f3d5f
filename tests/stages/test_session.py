"""What a stage works with: the model that is loaded, the prompts that it reads, and what is refused at the door."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_r1v2.config.schema import Part
from megatron_r1v2.stages.align import supervised_step
from megatron_r1v2.stages.loaded_model import open_model
from megatron_r1v2.stages.session import open_session
from megatron_r1v2.stages.step_prompts import next_distinct
from megatron_r1v2.training.store import finished_checkpoints
from tests.stages.runs import recipe_for


def test_a_folder_whose_tokenizer_and_config_disagree_is_refused(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(root / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config["image_token_id"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    recipe = recipe_for(root, tmp_path / "run", (f"model.hf_path={folder}",))
    with pytest.raises(ValueError, match=r"config.json says image_token_id=3; .*reassemble"), open_model(recipe):
        pass


def test_prompts_of_a_step_are_distinct_over_the_border_of_two_epochs(root: Path, tmp_path: Path) -> None:
    with open_session(recipe_for(root, tmp_path / "run"), stage="grpo", shown=()) as session:
        seen = []
        for _ in range(8):
            keys = [prompt.key for prompt in next_distinct(session.stream, 11)]
            assert len(set(keys)) == 11
            seen += keys
        assert len(set(seen)) == 16
        assert len(next_distinct(session.stream, 16)) == 16
        with pytest.raises(ValueError, match=r"only 16 distinct prompts but train.prompts_per_step=17"):
            next_distinct(session.stream, 17)


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


def test_ids_that_the_tokenizer_does_not_have_are_never_sampled(root: Path, tmp_path: Path) -> None:
    with open_model(recipe_for(root, tmp_path / "run")) as loaded:
        assert loaded.sampled_vocab_size == loaded.tokenizer.vocab_size < loaded.architecture.language.vocab_size


@pytest.mark.parametrize(
    ("every", "step", "last", "saved"),
    [(2, 4, False, True), (2, 3, False, False), (0, 4, False, False), (0, 3, True, True)],
)
def test_when_a_step_is_saved(root: Path, tmp_path: Path, every: int, step: int, last: bool, saved: bool) -> None:
    with open_session(recipe_for(root, tmp_path / "run"), stage="grpo", shown=()) as session:
        session.recipe.checkpoint.every_steps = every
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
