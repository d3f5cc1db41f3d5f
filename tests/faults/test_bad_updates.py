"""An exploding loss: the update is skipped and counted, its batch kept, and the run ends after a bound."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_r1v2.stages.grpo import rollouts
from megatron_r1v2.stages.grpo.stage import GrpoStage
from megatron_r1v2.stages.session import open_session
from megatron_r1v2.training.weight_checksums import compute_checksums
from tests.stages.runs import read_metrics, recipe_for, run_stage

EXPLODES = ("train.steps=6", "train.learning_rate=1e30", "checkpoint.every_steps=0")


@pytest.fixture
def without_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the check of the engine against training, which would see the weights first."""
    monkeypatch.setattr(rollouts, "check_engine", lambda *_, **__: {})


@pytest.mark.usefixtures("without_gate")
@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ("align", "its gradient is not finite"),
        ("mpo", "its gradient is not finite"),
        # No fresh response has an advantage then: it trains on replayed ones, whose old log-probs are stored.
        ("grpo", "its gradient is not finite"),
    ],
)
def test_a_loss_that_explodes_ends_the_run_after_the_bound(root: Path, tmp_path: Path, stage: str, reason: str) -> None:
    recipe = recipe_for(root, tmp_path / "run", EXPLODES, stage=stage)
    expected = rf"update 2 was skipped, since {reason}; with it 3 in a row are\. .* Lower train\.learning_rate"
    with pytest.raises(RuntimeError, match=expected):
        run_stage(recipe)
    assert [line["actor/skipped_updates"] for line in read_metrics(tmp_path / "run")] == [0.0, 1.0, 1.0]
    kept = sorted((tmp_path / "run" / "skipped").iterdir())
    assert [path.name for path in kept] == [f"update-00000002-{row}-replica-0.pt" for row in (1, 2, 3)]
    batches = torch.load(kept[0], weights_only=True)["batches"]
    assert sum(len(batch["token_ids_BS"]) for batch in batches) > 0
    assert all(torch.load(path, weights_only=True)["reason"] == reason for path in kept)


def test_exploded_weights_do_not_pass_the_gate_of_the_next_step(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rollout_corr/log_prob_abs_diff is nan: .* Delete the newest checkpoint"):
        run_stage(recipe_for(root, tmp_path / "run", EXPLODES))
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1]


@pytest.mark.usefixtures("without_gate")
def test_log_probs_that_are_not_finite_skip_the_update_and_keep_its_batch(root: Path, tmp_path: Path) -> None:
    recipe = recipe_for(root, tmp_path / "run", ("checkpoint.every_steps=0",))
    with open_session(recipe, stage="grpo", shown=()) as session, session.loaded.verifiers() as pool:
        stage = GrpoStage(session, recipe, pool)
        before = session.verifier.compute_checksums()
        temperature, session.policy.temperature = session.policy.temperature, float("nan")
        stage.step()
        assert session.recorder.values["actor/skipped_updates"] == 1.0
        assert (session.step, session.policy.version, session.verifier.compute_checksums()) == (1, 0, before)
        assert session.policy.skipped.in_a_row == 1
        session.save(stage.state_dict(), stage.buffer.samples.state_dict())
        session.policy.temperature = temperature
        while not session.policy.version and session.step < 10:  # a step without an effective group updates nothing
            stage.step()
        assert (session.policy.version, session.policy.skipped.in_a_row) == (1, 0)
    (kept,) = (tmp_path / "run" / "skipped").iterdir()
    assert "log-prob" in torch.load(kept, weights_only=True)["reason"]
    with open_session(recipe, stage="grpo", shown=()) as session:
        assert session.policy.skipped.in_a_row == 1


@pytest.mark.parametrize("stage", ["align", "grpo"])
def test_updates_above_a_gradient_norm_are_skipped_and_change_nothing(root: Path, tmp_path: Path, stage: str) -> None:
    settings = ("train.steps=2", "train.skip_above_grad_norm=1e-12")
    recipe = recipe_for(root, tmp_path / "run", settings)
    with open_session(recipe, stage=stage, shown=()) as session:
        before = compute_checksums(session.model, session.model.parts, session.context)
    run_stage(recipe)
    assert [line["actor/skipped_updates"] for line in read_metrics(tmp_path / "run")] == [1.0] * 2
    state = torch.load(tmp_path / "run" / "checkpoints" / "step-00000002" / "state.pt", weights_only=True)
    assert state["checksums"] == before
    assert state["version"] == 0
