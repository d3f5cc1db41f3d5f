"""A reward server that is gone ends the run; when it is back, what was generated is scored, not generated again."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1v2.rewards.served_model import ScoringFailed
from tests.rewards.test_served_model import Server, shorten_pauses
from tests.stages.runs import read_metrics, recipe_for, run_stage


def test_a_dead_server_costs_no_rollouts(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_pauses(monkeypatch)
    server = Server(tmp_path)
    settings = (
        "train.steps=2",
        "reward.model_weight=0.5",
        f"reward_model.url={server.address}/ok",
    )
    recipe = recipe_for(root, tmp_path / "run", settings)
    server.process.kill()
    server.process.wait()
    with pytest.raises(ScoringFailed, match=r"5 attempts.*refused.*; 0 of 24 responses"):
        run_stage(recipe)
    assert len(list((tmp_path / "run" / "unfinished" / "step-00000000").glob("*.pt"))) == 6
    (tmp_path / "again").mkdir()
    server = Server(tmp_path / "again")
    capfd.readouterr()
    try:
        run_stage(recipe_for(root, tmp_path / "run", (*settings, f"reward_model.url={server.address}/ok")))
    finally:
        server.process.kill()
        server.process.wait()
    assert "step 1: rollouts of 6 of 6 prompts are there from before" in capfd.readouterr().err
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]
