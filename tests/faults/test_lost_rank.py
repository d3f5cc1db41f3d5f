"""A rank that is killed or stopped: the others end, and say which one it was and what it was doing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.training.runs import Ranks, recipe_for

SETTINGS = (
    "train.steps=20",
    "generation.max_response_tokens=48",
    "generation.max_requests=8",
    "parallel.timeout_minutes=0.2",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_is_named_with_what_it_was_doing(root: Path, tmp_path: Path, number: signal.Signals) -> None:
    ranks = Ranks(recipe_for(root, tmp_path / "run", SETTINGS), 2)
    ranks.wait_until((tmp_path / "run" / "checkpoints" / "step-00000001").is_dir, 240)
    first, lost = ranks.processes
    os.kill(lost.pid, number)
    first.join(timeout=400)
    log = ranks.log.read_text()
    ranks.kill()
    assert first.exitcode == 1, log
    assert "where the ranks were:" in log or "rank 1 is lost" in log
    assert "  rank 1: step " in log
