"""A run folder that is whole, still growing, damaged, or was restarted."""

import json

import pytest

from megatron_r1v2.report.read import (
    CHANGES,
    PAIRS_SHOWN,
    ROLLOUTS_PER_STEP,
    STEPS_SHOWN,
    each_line,
    mean_of,
    read_run,
    rows_at,
)


def write(path, *rows, end=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


def test_metrics_are_numbers_by_step_and_of_a_step_done_twice_the_last(tmp_path):
    rows = [{"step": 2, "a": 1}, {"step": 1, "a": 2.5, "b": "text", "c": True}, {"step": 2, "a": 3, "d": 4}, {"a": 9}]
    write(tmp_path / "metrics.jsonl", *rows, end='{"step": 3, "a"')
    run = read_run(tmp_path)
    assert run.metrics == {1: {"a": 2.5}, 2: {"a": 3.0, "d": 4.0}}
    assert list(run.metrics) == [1, 2]
    assert run.series("a") == ([1, 2], [2.5, 3.0])
    assert run.series("d") == ([2], [4.0])
    assert run.notes == []


def test_what_is_missing_is_noted_and_a_missing_folder_refused(tmp_path):
    run = read_run(tmp_path)
    assert run.notes == ["There is no metrics.jsonl yet, so no curves are shown."]
    assert (run.rollouts, run.evaluations, run.settings) == ({}, [], "")
    with pytest.raises(ValueError, match=r"run folder '.*none' does not exist"):
        read_run(tmp_path / "none")


def test_lines_are_found_again_by_their_bytes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "caf\xc3\xa9"}\n\xff\n\n{"b": 2}\n[1]\n{"c"')
    notes = []
    found = dict(each_line(path, notes))
    assert list(found.values()) == [{"a": "caf\u00e9"}, {"b": 2}]
    assert rows_at(path, list(found)[::-1]) == [{"b": 2}, {"a": "caf\u00e9"}]
    assert notes == ["rows.jsonl: 2 damaged lines were left out."]


def test_a_few_steps_and_a_few_rollouts_of_each_are_shown(tmp_path):
    rows = [{"step": step, "n": n, "correct": n > 0} for step in range(1, 41) for n in range(10)]
    write(tmp_path / "rollouts.jsonl", *rows)
    run = read_run(tmp_path)
    assert len(run.rollouts) == STEPS_SHOWN
    assert (min(run.rollouts), max(run.rollouts)) == (1, 40)
    for shown in run.rollouts.values():
        assert len(shown) == ROLLOUTS_PER_STEP
        assert [row["correct"] for row in shown].count(False) == 1


def test_the_largest_advantages_of_a_step_come_first(tmp_path):
    advantages = (0.1, -2.0, 0.5, 1.5, -0.2, 0.0, float("nan"), 0.9)
    rows = [{"step": 1, "advantage": value, "correct": value > 0} for value in advantages]
    write(tmp_path / "rollouts.jsonl", *rows)
    shown = [row["advantage"] for row in read_run(tmp_path).rollouts[1]]
    assert shown == [-2.0, 1.5, 0.9, -0.2]


def write_evaluations(folder, right, **finished):
    """Write evaluations of four kinds of prompts, each right or wrong; `finished`: when, by name."""
    for name, values in right.items():
        write(folder / f"evaluation-{name}.json", {"finished": finished[name]} if name in finished else {})
        lines = [
            {"prompt_key": f"{kind}-{n}", "correct": bool(value), "name": name}
            for n in range(30)
            for kind, value in enumerate(values)
        ]
        write(folder / f"evaluation-{name}.rollouts.jsonl", *lines)


def test_the_prompts_of_the_first_and_the_last_evaluation_are_paired(tmp_path):
    right = {"grpo": [0, 1, 0, 1], "aligned": [0, 0, 1, 1], "mpo": [1, 1, 1, 1]}
    times = {"aligned": "2026-11-01T10:00:00+00:00", "mpo": "2026-11-01T11:00:00+00:00"}
    write_evaluations(tmp_path, right, **times, grpo="2026-11-02T09:00:00+00:00")
    run = read_run(tmp_path)
    assert [row["name"] for row in run.evaluations] == ["aligned", "mpo", "grpo"]
    assert (run.comparison.first, run.comparison.last) == ("aligned", "grpo")
    assert run.comparison.changes == dict.fromkeys(CHANGES, 30)
    assert len(run.comparison.pairs) == PAIRS_SHOWN
    assert {pair.change for pair in run.comparison.pairs} == set(CHANGES)
    for pair in run.comparison.pairs:
        assert pair.before["prompt_key"] == pair.after["prompt_key"]
        assert (pair.before["name"], pair.after["name"]) == ("aligned", "grpo")
        kind = int(str(pair.before["prompt_key"])[0])
        assert pair.change == ("stayed wrong", "turned right", "turned wrong", "stayed right")[kind]
    named = read_run(tmp_path, ("grpo", "mpo")).comparison
    assert (named.first, named.last) == ("grpo", "mpo")
    assert named.changes == {"turned right": 60, "turned wrong": 0, "stayed wrong": 0, "stayed right": 60}
    with pytest.raises(ValueError, match="has no evaluation 'sft'; it has aligned, mpo, grpo"):
        read_run(tmp_path, ("sft", "mpo"))


def test_evaluations_of_other_prompts_are_not_paired_with_the_last(tmp_path):
    write_evaluations(tmp_path, {"digits": [0, 1], "digits2": [1, 1]}, digits="2026-11-01", digits2="2026-11-03")
    write(tmp_path / "evaluation-mmmu.json", {"finished": "2026-10-01"})
    write(tmp_path / "evaluation-mmmu.rollouts.jsonl", {"prompt_key": "mmmu-1", "correct": True})
    comparison = read_run(tmp_path).comparison
    assert (comparison.first, comparison.last) == ("digits", "digits2")
    assert comparison.changes["turned right"] == 30


def test_an_evaluation_without_a_time_is_as_old_as_its_file(tmp_path):
    write_evaluations(tmp_path, {"b": [1], "a": [0]}, a="1990-01-01")
    assert [row["name"] for row in read_run(tmp_path).evaluations] == ["a", "b"]


def test_an_evaluation_that_is_damaged_is_noted(tmp_path):
    (tmp_path / "evaluation-broken.json").write_text("{")
    (tmp_path / "evaluation-list.json").write_text("[]")
    write(tmp_path / "evaluation-mid.json", {"pass_at_1": 0.5})
    run = read_run(tmp_path)
    assert run.evaluations == [{"name": "mid", "pass_at_1": 0.5}]
    assert "evaluation-broken.json is not readable and was left out." in run.notes


def test_the_mean_is_over_the_steps_that_have_a_finite_value():
    values = {1: {"a": 1.0}, 2: {}, 3: {"a": float("nan")}, 4: {"a": 3.0}, 5: {"a": 5.0}}
    assert mean_of(values, "a", slice(None)) == 3.0
    assert mean_of(values, "a", slice(-2, None)) == 4.0
    assert mean_of(values, "b", slice(None)) is None
