"""Replicas with other weights, a checkpoint that is not what it says, an engine that computes something else: each ends
the run with the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_r1v2.config.choices import Part
from megatron_r1v2.stages.grpo.stage import GrpoStage
from megatron_r1v2.stages.session import open_session
from megatron_r1v2.training import weight_verification
from tests.ranks import run_ranks
from tests.stages.runs import recipe_for


def spoil_one_rank(root: str, output: str, part: str) -> str:
    """Change one element on rank 1 and return what is said of it."""
    with open_session(recipe_for(Path(root), Path(output)), stage="grpo", shown=()) as session:
        session.verifier.verify_weights({}, None)
        if session.context.data_rank == 1:
            with torch.no_grad():
                next(getattr(session.model, part).parameters()).view(-1)[3].add_(1e-3)
        try:
            session.verifier.verify_weights({}, None)
        except RuntimeError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("part", ["adapter", "vision"])  # that trains, and that does not
def test_a_replica_with_other_weights_is_noticed(root: Path, tmp_path: Path, part: str) -> None:
    told = run_ranks(2, spoil_one_rank, str(root), str(tmp_path / "run"), part)
    assert all(
        f"the {part} weights of the data-parallel replicas differ (checksums replica 0: " in text for text in told
    )


def test_a_frozen_part_that_changes_on_all_replicas_is_noticed(root: Path, tmp_path: Path) -> None:
    with open_session(recipe_for(root, tmp_path / "run"), stage="grpo", shown=()) as session:
        session.verifier.verify_weights({}, None)
        with torch.no_grad():
            next(session.model.adapter.parameters()).view(-1)[3].add_(1e-3)
        session.verifier.verify_weights({}, None)
        next(session.model.vision.parameters()).data.view(-1).view(torch.int32)[0] ^= 1
        with pytest.raises(RuntimeError, match="the vision weights do not train, but have changed since the run start"):
            session.verifier.verify_weights({}, None)


def test_a_look_at_the_trained_parts_takes_the_frozen_ones_for_known(root: Path, tmp_path: Path) -> None:
    with open_session(recipe_for(root, tmp_path / "run"), stage="grpo", shown=()) as session:
        verifier = session.verifier
        before = verifier.verify_weights({}, None)
        next(session.model.vision.parameters()).data.view(-1).view(torch.int32)[0] ^= 1
        with torch.no_grad():
            next(session.model.adapter.parameters()).view(-1)[3].add_(1e-3)
        after = verifier.verify_weights({}, None, trained_only=True)
        assert after.keys() == before.keys()
        assert {name for name in before if after[name] != before[name]} == {"adapter"}
        with pytest.raises(RuntimeError, match="the vision weights do not train, but have changed"):
            verifier.verify_weights({}, None)


def test_a_start_without_a_checkpoint_computes_the_checksums_once(root: Path, tmp_path: Path, monkeypatch) -> None:
    computed, original = [], weight_verification.compute_checksums

    def counting(model, parts, context):
        computed.extend(part.value for part in parts)
        return original(model, parts, context)

    monkeypatch.setattr(weight_verification, "compute_checksums", counting)
    with open_session(recipe_for(root, tmp_path / "run"), stage="grpo", shown=()) as session:
        assert computed == [part.value for part in session.model.parts]
        assert session.verifier.verify_weights({}, None) == original(
            session.model, session.model.parts, session.context
        )


def test_a_checkpoint_of_other_weights_is_noticed(root: Path, tmp_path: Path) -> None:
    with open_session(recipe_for(root, tmp_path / "run"), stage="grpo", shown=()) as session:
        saved = session.verifier.compute_checksums()
        assert session.verifier.verify_weights(saved, tmp_path) == saved
        for part in session.model.parts:
            with pytest.raises(RuntimeError, match=f"the {part.value} weights loaded from .* have checksum"):
                session.verifier.verify_weights(saved | {part.value: saved[part.value] ^ 1}, tmp_path)


def test_a_checkpoint_tells_the_model_that_it_started_from(root: Path, tmp_path: Path) -> None:
    with open_session(recipe_for(root, tmp_path / "run"), stage="grpo", shown=()) as session:
        record = session.verifier.describe_weights([Part.adapter])
        assert record["checksums"] == session.verifier.compute_checksums()
        base = record["base"]
        assert base["checksums"] == {name: record["checksums"][name] for name in ("vision", "language")}
        assert base["dtype"] == "float32"
        assert base["architecture"]["image_token_id"] == session.model.architecture.image_token_id


def test_an_engine_that_disagrees_is_noticed_before_it_generates(root: Path, tmp_path: Path) -> None:
    recipe = recipe_for(root, tmp_path / "run", ("algorithm.max_log_prob_difference=0.01",))
    with open_session(recipe, stage="grpo", shown=()) as session, session.loaded.verifiers() as pool:
        stage = GrpoStage(session, recipe, pool)
        stage.step()
        assert 0 <= session.recorder.values["gate/log_prob_abs_diff"] < 1e-4
        session.policy.temperature = 2.0  # of the training forward alone
        with pytest.raises(
            ValueError, match=r"log_prob_abs_diff is .*, above algorithm.max_log_prob_difference = 0.01"
        ):
            stage.step()
        assert "timing_s/generate" not in session.recorder.values or session.step == 1
