"""The benchmark of segments: the steps that count, and turns that are added to a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import segments
from benchmarks.segments import main, summarize


def row(seconds: float, tokens: float, **more: float) -> dict[str, float]:
    times = {f"timing_s/{name}": 0.5 for name in ("log_probs", "update")}
    return {
        "timing_s/step": seconds,
        "timing_s/generate": 2.0,
        "perf/generated_tokens_per_second": tokens / 2,
        "rollout/wait_s/max": 0.1,
        **times,
        **more,
    }


def test_only_steps_between_the_first_and_the_last_count() -> None:
    rows = [row(90.0, 1), row(3.0, 500, **{"response_length/max": 70}), row(4.0, 250), row(5.0, 250), row(80.0, 1)]
    found = summarize(rows, skipped=1)
    assert found["steps"] == 3
    assert found["timing_s/step"] == 4.0
    assert found["tokens a step"] == pytest.approx(1000 / 3)
    assert found["seconds of 1,000 tokens"] == pytest.approx(12.0)
    assert found["longest response"] == 70


def test_both_ways_take_turns_and_are_added_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def run_steps(options: object, segment_tokens: int, folder: Path) -> list[dict[str, float]]:
        runs.append(segment_tokens)
        return [row(1.0 + bool(segment_tokens), 100)] * 3

    monkeypatch.setattr(segments, "run_steps", run_steps)
    output = tmp_path / "out.json"
    for turns in ("1", "2"):
        main(["--output", str(output), "--turns", turns, "--skipped", "1", "--segment", "40"])
    assert runs == [0, 40] * 3
    found = json.loads(output.read_text())
    assert [turn["segments"]["timing_s/step"] / turn["whole"]["timing_s/step"] for turn in found] == [2.0] * 3
    assert found[0]["settings"]["segment"] == 40
    assert "output" not in found[0]["settings"]
