"""A rank that is killed or stopped: the others end, and say which one it was and what it was doing."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.stages.runs import Ranks, recipe_for

SETTINGS = (
    "train.steps=20",
    "generation.max_response_tokens=48",
    "generation.max_requests=8",
    "parallel.timeout_minutes=0.2",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_is_named_with_what_it_was_doing(
    root: Path, tmp_path: Path, number: signal.Signals, lost: int
) -> None:
    """The first rank has the store that the others would read: without it, the other reports its own work."""
    ranks = Ranks(recipe_for(root, tmp_path / "run", SETTINGS), 2)
    kept = tmp_path / "run" / "unfinished"
    # Both generate step 2 then: they share its prompts, and the first is done.
    ranks.wait_until(lambda: any(kept.glob("step-00000001/*.pt")), 240)
    os.kill(ranks.processes[lost].pid, number)
    other = ranks.processes[1 - lost]
    other.join(timeout=400)
    log = ranks.log.read_text()
    ranks.kill()
    assert other.exitcode == 1, log
    assert "where the ranks were:" in log or f"rank {lost} is lost" in log
    # Of the lost one what it said last, up to some seconds before: it may not have told yet that step 1 is saved.
    before = r"^  rank 1: step (1, save|2, gate|2, generate), since"
    told = before if lost else r"rank 1 itself: step 2, (generate|reward|exchange|log_probs)\b"
    assert re.search(told, log, re.MULTILINE), log
