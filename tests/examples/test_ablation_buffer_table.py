import json
import math

import pytest

from examples.digits import ablation_buffer_table as table


def write_run(folder, values, responses=100):
    folder.mkdir(parents=True)
    rows = [
        {
            "step": number + 1,
            "rollout/responses": responses,
            "rollout/tokens": 10 * responses,
            "ssb/fresh_effective_fraction": 0.2,
            "ssb/trained_effective_fraction": 0.6,
            "validation/pass_at_1": value,
        }
        for number, value in enumerate(values)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_an_interval_is_students():
    found = table.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # t(0.975, 4) = 2.776445; standard deviation sqrt(2.5).
    assert (found.mean, found.half_width) == (3.0, pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6))
    assert found.excludes_zero
    assert not table.interval([-1.0, 1.0, 0.5]).excludes_zero
    alone = table.interval([7.0])
    assert (alone.text(), alone.excludes_zero) == ("7", False)
    assert table.Interval(1200.0, 100.0).text() == "1,200 (1,100 to 1,300)"


def test_a_curve_is_the_mean_of_three_validations():
    curve = [(100.0, 0.1), (200.0, 0.4), (300.0, 0.7), (400.0, 1.0)]
    assert table.smooth(curve) == [(300.0, pytest.approx(0.4)), (400.0, pytest.approx(0.7))]
    assert table.smooth(curve[:2]) == []


def test_a_target_that_is_not_reached_costs_all_responses(tmp_path):
    reached = table.outcome(write_run(tmp_path / "a", [0.8, 0.8, 0.8, 0.9, 1.0, 1.0]))
    assert reached.reached
    # The means are 0.8, 0.8333, 0.9, 0.9667: the target is between those at 500 and 600 responses.
    assert reached.to_target == pytest.approx(500 + 100 * (table.TARGET - 0.9) / (0.2 / 3))
    assert reached.late == pytest.approx((0.9 + 1.0 + 1.0) / 3)
    missed = table.outcome(write_run(tmp_path / "b", [0.8] * 6))
    assert (missed.reached, missed.to_target, missed.responses) == (False, 600.0, 600.0)
    with pytest.raises(FileNotFoundError):
        table.late_pass_at_1(tmp_path / "none")


def test_arms_are_compared_seed_by_seed(tmp_path):
    def runs(arm, shift):
        # Seeds are far apart; the arms differ by the same little in each.
        return {
            seed: write_run(tmp_path / arm / str(seed), [0.7 + 0.05 * seed + shift + 1e-3 * (seed % 2)] * 6)
            for seed in (1, 2, 3)
        }

    arms = {
        "plain": table.ArmRuns("no buffer", 1e-5, runs("plain", 0.0), "plain"),
        "buffer": table.ArmRuns("buffer", 2e-5, runs("buffer", 0.02), "plain"),
        "untried": table.ArmRuns("untried", 2e-5, {}, "plain"),
    }
    text = table.write_table(tmp_path, arms)
    assert text == (tmp_path / "table-buffer.md").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("| buffer |"))
    assert "| 2e-05 | 3 | 20 / 60 % | 600 |" in line
    assert line.endswith("| **2.0 (2.0 to 2.0)** |")
    assert "| no buffer |" in line
    assert "untried" not in text
    content = json.loads((tmp_path / "table-buffer.json").read_text())
    assert content["arms"]["buffer"]["runs"]["2"]["late"] == pytest.approx(0.82)
    assert content["target"] == table.TARGET


def test_one_seed_gives_no_difference(tmp_path):
    run = {1: table.outcome(write_run(tmp_path / "a", [0.8] * 6))}
    assert table.paired(run, run, "late") is None
