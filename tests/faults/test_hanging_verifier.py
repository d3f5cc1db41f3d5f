"""An answer check that never ends: each costs its time limit, is counted, and the run ends as it should."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1v2.data.samples import ShardSample
from megatron_r1v2.data.shards import write_shards
from megatron_r1v2.rewards import verifiers
from megatron_r1v2.rewards.answer import last_boxed
from megatron_r1v2.stages.grpo import stage
from tests.stages.runs import last_checkpoint, read_metrics, read_rollouts, recipe_for, run_stage

HANGS = "9^{9^{9}}"
"""math-verify computes it."""


def test_a_hanging_check_is_a_wrong_answer_and_no_more(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifiers, "TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(stage, "ROLLOUTS_KEPT", 24)
    answers = [("math", HANGS), *[("exact", str(index % 2)) for index in range(5)]]
    samples = [
        ShardSample(
            f"sample-{index}", ({"role": "user", "content": "abcdefgh"[index:] + "?"},), answer, answer_type=kind
        )
        for index, (kind, answer) in enumerate(answers)
    ]
    write_shards(samples, tmp_path / "data")
    settings = (
        "train.steps=2",
        f"data.train={tmp_path / 'data'}",
    )
    run = run_stage(recipe_for(root, tmp_path / "run", settings))
    lines, rollouts = read_metrics(run), read_rollouts(run)
    assert len(rollouts) == 2 * 24
    for line in lines:
        of_step = [rollout for rollout in rollouts if rollout["step"] == line["step"]]
        checked = [r for r in of_step if r["answer"] == HANGS and last_boxed(r["text"]) is not None]
        assert line["verifier/timeouts"] == len(checked)
        assert line["verifier/crashes"] == 0
        assert line["critic/rewards/mean"] > 0
    assert sum(line["verifier/timeouts"] for line in lines) > 0
    assert last_checkpoint(run).name == "step-00000002"
