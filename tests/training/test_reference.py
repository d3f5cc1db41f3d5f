"""The reference policy is what the stage started from, and leaves no trace in the model in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_r1v2.stages.align import supervised_step
from megatron_r1v2.stages.session import open_session
from tests.stages.runs import recipe_for


def test_the_reference_takes_the_place_of_what_trains_and_gives_it_back(root: Path, tmp_path: Path) -> None:
    recipe = recipe_for(root, tmp_path / "run", ("algorithm.kl_coefficient=0.1", "train.parts=[adapter, language]"))
    with open_session(recipe, stage="grpo", shown=(), keep_reference=True) as session:
        model, reference = session.policy.model, session.reference
        assert reference is not None
        start = {name: value.detach().clone() for name, value in model.named_parameters()}
        supervised_step(session)
        trained = {name: value.detach().clone() for name, value in model.named_parameters()}
        moved = {name.split(".")[0] for name in start if not torch.equal(start[name], trained[name])}
        assert moved == {"adapter", "language"}
        storage = {name: value.data_ptr() for name, value in model.named_parameters()}
        with reference.in_place_of(model):
            for name, value in model.named_parameters():
                assert torch.equal(value, start[name]), name
        with pytest.raises(KeyError), reference.in_place_of(model):
            raise KeyError("an error inside must not leave the reference in place")
        for name, value in model.named_parameters():
            assert torch.equal(value, trained[name]), name
            assert value.data_ptr() == storage[name]  # DDP's buffer still holds it


def test_without_a_kl_term_there_is_no_copy(root: Path, tmp_path: Path) -> None:
    with open_session(recipe_for(root, tmp_path / "run"), stage="grpo", shown=()) as session:
        assert session.reference is None
