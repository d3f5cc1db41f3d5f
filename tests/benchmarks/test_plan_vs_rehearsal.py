"""The table of rehearsals beside their plans; the comparison itself is held by tests/planning/test_rehearsed.py."""

import pytest

from benchmarks import plan_vs_rehearsal
from benchmarks.plan_vs_rehearsal import Case, Compared, Kept, Rehearsed, extend, table_rows
from megatron_r1v2.planning.memory import RankMemory
from megatron_r1v2.rehearsal.few_layers import Layers, Line
from megatron_r1v2.rehearsal.ledger import PhaseMemory
from megatron_r1v2.rehearsal.preparation import Step
from tests.planning.plans import RECIPE

MIB = 2**20
STEP = Step(long=2, short=0, mixed_groups=1, prompts_of_replica=64, long_of_replica=2)
CASE = Case(RECIPE, (), Layers(1, 1))
PHASES = ("gate", "generate", "update", "evaluate")


def compared(phase, *, rehearsed, planned, stage=0):
    memory = RankMemory(stage, phase, planned * MIB, 0, 0, 0, 0, 0, 0)
    return Compared(stage, PhaseMemory(phase, 0, rehearsed * MIB, at_peak={"parameters": 7 * MIB}), memory)


def test_a_deviation_is_what_the_planner_says_more():
    found = compared("update", rehearsed=2000, planned=2100)
    assert found.deviation == pytest.approx(0.05)
    assert found.terms == "stage 0, update +5.0%: parameters 7/2100 at its beginning"


def found(*ranks):
    return type("Found", (), {"ranks": ranks, "step": STEP})


def rank(*phases):
    return type("Rank", (), {"error": "", "stage": 0, "phases": phases})


def test_a_row_has_both_figures_of_a_phase_at_few_layers_and_at_all():
    few = [compared(phase, rehearsed=1500, planned=1000) for phase in ("gate", "update")]
    whole = [compared(phase, rehearsed=4000, planned=4040) for phase in ("gate", "update")]
    assert table_rows("grpo", few, whole) == [
        f"| `grpo` | 0 | {phase} | 1,500 | 1,000 | -33.3% | 4,000 | 4,040 | +1.0% |" for phase in ("gate", "update")
    ]


def test_the_fuller_of_two_steps_is_compared(monkeypatch):
    steps = [PhaseMemory(phase, 0, size * MIB) for size in (1, 3, 2) for phase in PHASES]
    monkeypatch.setattr(plan_vs_rehearsal, "rehearse", lambda *_, **__: found(rank(*steps)))
    rehearsed = plan_vs_rehearsal.rehearse_case(CASE)
    sides = plan_vs_rehearsal.compare(CASE, rehearsed)
    assert [(each.planned.phase, each.rehearsed.peak) for each in sides] == [(phase, 3 * MIB) for phase in PHASES]


def test_a_phase_that_fails_or_is_missing_is_an_error(monkeypatch):
    with pytest.raises(RuntimeError, match=r"planned, but not rehearsed: \[\(0, 'evaluate'\), \(0, 'gate'\)"):
        plan_vs_rehearsal.compare(CASE, Rehearsed({}, STEP))
    failed = type("Rank", (), {"error": "it fell", "error_phase": "gate", "stage": 1})
    monkeypatch.setattr(plan_vs_rehearsal, "rehearse", lambda *_, **__: found(failed))
    with pytest.raises(RuntimeError, match="stage 1, gate: it fell"):
        plan_vs_rehearsal.rehearse_case(CASE)


def test_bytes_of_a_layer_that_differ_show_on_the_line():
    line = Line(Layers(1, 1), Layers(2, 2), Layers(64, 64))
    few = [compared("gate", rehearsed=100, planned=101), compared("update", rehearsed=100, planned=101)]
    more = [compared("gate", rehearsed=110, planned=112), compared("update", rehearsed=110, planned=111)]
    gate, update = extend(few, more, line)
    assert [(each.rehearsed.peak, each.planned.total) for each in (gate, update)] == [
        (730 * MIB, 794 * MIB),
        (730 * MIB, 731 * MIB),
    ]
    assert gate.terms.startswith("stage 0, gate +8.8%: parameters 7/794, ")


def test_a_finished_rehearsal_is_kept_and_not_made_again(monkeypatch, tmp_path):
    made = Rehearsed({(0, "update"): PhaseMemory("update", 1, 2, at_peak={"parameters": 2})}, STEP)
    monkeypatch.setattr(plan_vs_rehearsal, "rehearse_case", lambda _: made)
    assert Kept(tmp_path / "kept.json").rehearse(CASE) == made
    monkeypatch.setattr(plan_vs_rehearsal, "rehearse_case", lambda _: Rehearsed({}, STEP))
    again = Kept(tmp_path / "kept.json")
    assert again.rehearse(CASE) == made
    assert again.rehearse(Case(RECIPE, (), Layers(1, 2))).phases == {}, "another case"
    assert Kept(None).rehearse(CASE).phases == {}


def test_the_table_is_printed_recipe_by_recipe(monkeypatch, capsys):
    both = [compared("update", rehearsed=10, planned=10)]
    monkeypatch.setattr(plan_vs_rehearsal, "rehearse_case", lambda _: Rehearsed({}, STEP))
    monkeypatch.setattr(plan_vs_rehearsal, "compare", lambda *_: both)
    plan_vs_rehearsal.main([str(RECIPE.parent), "align"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].count("|") == lines[0].count("|") == 10
    assert lines[2:] == ["| `align` | 0 | update | 10 | 10 | +0.0% | 10 | 10 | +0.0% |"]
