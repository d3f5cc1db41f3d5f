"""Parts of a model as a checkpoint names them, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_r1v2.checkpoint.megatron.run_folder import TENSORS
from megatron_r1v2.config.choices import Part
from megatron_r1v2.stages.loaded_model import open_model
from megatron_r1v2.training.part_state import check_shapes, fill, part_names, part_state
from tests.stages.runs import recipe_for


def test_names_are_distinct_and_sorted() -> None:
    assert part_names([Part.language, Part.adapter, Part.adapter]) == ["adapter", "language"]


def test_only_the_wanted_parts_are_described_saved_and_filled(root: Path, tmp_path: Path) -> None:
    with open_model(recipe_for(root, tmp_path / "run")) as loaded:
        model = loaded.model
        state = part_state(model, [Part.adapter])
        assert {key.split(".")[0] for key in state} == {"adapter"}
        assert len(state) == len(list(model.adapter.parameters()))
        (tmp_path / "saved" / TENSORS).mkdir(parents=True)
        dist_checkpointing.save({"model": state}, str(tmp_path / "saved" / TENSORS))
        check_shapes(state, tmp_path / "saved")
        with pytest.raises(ValueError, match="does not fit the model: vision.* is not in it"):
            check_shapes(part_state(model, [Part.vision]), tmp_path / "saved")
        name, wrong = next(iter(part_state(model, [Part.adapter]).items()))
        wrong.global_shape = (3, 5)
        with pytest.raises(ValueError, match=rf"{wrong.key} is \[.*\] in it and \[3, 5\] in the model"):
            check_shapes({name: wrong}, tmp_path / "saved")
        fill(model, {name: torch.full_like(entry.data, 0.5) for name, entry in state.items()}, tmp_path)
        assert all(bool((weight == 0.5).all()) for weight in model.adapter.parameters())
        assert not any(bool((weight == 0.5).all()) for weight in model.language.parameters())


def test_what_is_missing_or_unknown_is_named(root: Path, tmp_path: Path) -> None:
    with open_model(recipe_for(root, tmp_path / "run")) as loaded:
        whole = {name: entry.data for name, entry in part_state(loaded.model, [Part.adapter]).items()}
        first, *_ = whole
        with pytest.raises(ValueError, match=rf"missing \['{first}'\], unexpected \[\]"):
            fill(loaded.model, {name: value for name, value in whole.items() if name != first}, tmp_path)
        with pytest.raises(ValueError, match=r"missing \[\], unexpected \['adapter.other'\]"):
            fill(loaded.model, whole | {"adapter.other": torch.zeros(1)}, tmp_path)
