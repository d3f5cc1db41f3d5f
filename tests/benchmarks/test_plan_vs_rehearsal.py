"""The table of rehearsals beside their plans; the comparison itself is held by tests/planning/test_rehearsed.py."""

import pytest

from benchmarks import plan_vs_rehearsal
from benchmarks.plan_vs_rehearsal import Compared, plan_as_rehearsed, table_rows
from megatron_r1v2.planning.memory import RankMemory
from megatron_r1v2.rehearsal.ledger import PhaseMemory
from megatron_r1v2.rehearsal.preparation import Step
from tests.planning.plans import RECIPE, plan_of

MIB = 2**20


def compared(phase, *, rehearsed, planned, stage=0):
    memory = RankMemory(stage, phase, planned * MIB, 0, 0, 0, 0, 0, 0)
    return Compared(stage, PhaseMemory(phase, 0, rehearsed * MIB, at_peak={"parameters": 7 * MIB}), memory)


def test_a_deviation_is_what_the_planner_says_more():
    found = compared("update", rehearsed=2000, planned=2100)
    assert found.deviation == pytest.approx(0.05)
    assert found.terms == "stage 0, update +5.0%: parameters 7/2100 at its beginning"


def test_a_row_has_both_figures_of_a_phase():
    both = [compared(phase, rehearsed=1500, planned=1000) for phase in ("gate", "update")]
    assert table_rows("grpo", (2, 6), both) == [
        f"| `grpo` | 6 | 0 | {phase} | 1,500 | 1,000 | -33.3% |" for phase in ("gate", "update")
    ]


def test_the_fuller_of_two_steps_is_compared(monkeypatch):
    phases = ("gate", "generate", "update", "evaluate")
    steps = [PhaseMemory(phase, 0, size * MIB) for size in (1, 3, 2) for phase in phases]

    class Found:
        ranks = (type("Rank", (), {"error": "", "stage": 0, "phases": steps}),)
        step = Step(long=2, short=0, mixed_groups=1, prompts_of_replica=64, long_of_replica=2)

    monkeypatch.setattr(plan_vs_rehearsal, "rehearse", lambda *_, **__: Found)
    found = plan_vs_rehearsal.compare(RECIPE, (), layers=(1, 1))
    assert [(each.planned.phase, each.rehearsed.peak) for each in found] == [(phase, 3 * MIB) for phase in phases]


def test_the_plan_of_what_was_rehearsed_has_fewer_rows_than_the_fullest_step():
    plan = plan_of()
    step = Step(long=2, short=0, mixed_groups=1, prompts_of_replica=64, long_of_replica=2)
    rehearsed = {each.phase: each.total for each in plan_as_rehearsed(plan, step)}
    assert rehearsed.keys() == {each.phase for each in plan.memory.ranks}
    assert all(rehearsed[each.phase] <= each.total for each in plan.memory.ranks)


def test_a_phase_that_fails_or_is_missing_is_an_error(monkeypatch):
    class Found:
        ranks, step = (), Step(long=2, short=0, mixed_groups=1, prompts_of_replica=64, long_of_replica=2)

    monkeypatch.setattr(plan_vs_rehearsal, "rehearse", lambda *_, **__: Found)
    with pytest.raises(RuntimeError, match=r"planned, but not rehearsed: \[\(0, 'evaluate'\), \(0, 'gate'\)"):
        plan_vs_rehearsal.compare(RECIPE, (), layers=(1, 1))
    failed = type("Rank", (), {"error": "it fell", "error_phase": "gate", "stage": 1})
    monkeypatch.setattr(Found, "ranks", (failed,))
    with pytest.raises(RuntimeError, match="stage 1, gate: it fell"):
        plan_vs_rehearsal.compare(RECIPE, (), layers=(1, 1))


def test_the_table_is_printed_recipe_by_recipe(monkeypatch, capsys):
    monkeypatch.setattr(plan_vs_rehearsal, "compare", lambda *_, **__: [compared("update", rehearsed=10, planned=10)])
    plan_vs_rehearsal.main(RECIPE.parent, ["align"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].count("|") == lines[0].count("|") == 8
    assert lines[2:] == [f"| `align` | {layers} | 0 | update | 10 | 10 | +0.0% |" for layers in (2, 6)]
