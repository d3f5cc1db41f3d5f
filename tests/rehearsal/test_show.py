"""The print-out of a rehearsal and its verdict."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megatron_r1v2.planning.memory import GIB
from megatron_r1v2.rehearsal.collectives import Collective
from megatron_r1v2.rehearsal.ledger import PhaseMemory
from megatron_r1v2.rehearsal.preparation import Step, plan_step
from megatron_r1v2.rehearsal.rank import RankResult
from megatron_r1v2.rehearsal.run import Rehearsal, plan_as_rehearsed, planned_flops
from megatron_r1v2.rehearsal.show import NOT_PROVEN, as_json, print_rehearsal
from tests.planning.plans import plan_of

ROOT = Path(__file__).parents[2]
STEP = Step(long=2, short=14, mixed_groups=1, prompts_of_replica=64, long_of_replica=2)


@pytest.fixture(scope="module")
def plan():
    return plan_of()


def rank(peak=20.0, **changes):
    phases = [
        PhaseMemory("start", 0, int(peak * GIB)),
        PhaseMemory(
            "update", 0, int(peak * GIB), at_peak={"activations": GIB}, line="models/mlp.py:7 forward", flops=3 * 10**12
        ),
    ]
    result = RankResult(
        0,
        place="stage 0, TP 0, DP 0",
        phases=phases,
        flops={"update": 3 * 10**12},
        collectives=[Collective("allreduce_", (0, 1), "float32", 8, 32)],
        questions=[
            ("an unknown number: 1", "models/mlp.py:9 forward < models/r1v2.py:3 forward", 4),
            ("an unknown number: 1", "models/mlp.py:9 forward < models/r1v2.py:5 forward", 2),
            ("an unknown number: 1", "models/norms.py:2 forward", 1),
        ],
    )
    return replace(result, **changes)


def printed(found):
    console = Console(file=io.StringIO(), width=120)
    print_rehearsal(found, console)
    return console.file.getvalue()


def test_it_prints_peaks_beside_the_plan_with_lines_rules_and_limits(plan):
    text = printed(Rehearsal(plan, (rank(),), (), STEP))
    planned, most = (
        next(each for each in ranks if each.phase == "update").total / GIB
        for ranks in (plan_as_rehearsed(plan, STEP), plan.memory.ranks)
    )
    row = next(line for line in text.splitlines() if line.startswith("update"))
    of_plan = planned_flops(plan, STEP, 0)["update"] / 1e12
    assert row.split()[-6:] == ["1.00", "20.00", f"{planned:.2f}", f"{most:.2f}", "3.0", f"{of_plan:.1f}"]
    assert planned < most
    assert "fullest in update: models/mlp.py:7 forward" in text
    assert "allreduce_" in text
    assert "- an unknown number: 1 (7): models/mlp.py:9 forward (6), and 1 other places" in text
    assert "It runs and fits" in text
    assert " ".join(text.split()).endswith(NOT_PROVEN)


@pytest.mark.parametrize(
    ("changes", "mismatches", "words"),
    [
        ({}, ("call 3 in the group of 2 ranks",), "It would hang"),
        ({"error": "RuntimeError: no", "error_phase": "gate"}, (), "It does not run: stage 0, TP 0, DP 0, gate"),
        ({"peak": 90.0}, (), "It does not fit: stage 0, TP 0, DP 0, start: 90.0"),
    ],
)
def test_each_finding_is_said_and_fails_the_rehearsal(plan, changes, mismatches, words):
    found = Rehearsal(plan, (rank(**changes),), mismatches, STEP)
    assert not found.passed
    text = printed(found)
    assert words in text
    assert all(each in text for each in (*mismatches, changes.get("error", "")))


def test_json_has_the_same_in_bytes(plan):
    values = as_json(Rehearsal(plan, (rank(),), (), STEP))
    assert values["passed"] is True
    (told,) = values["ranks"]
    update = told["phases"][1]
    assert update["peak"] == 20 * GIB
    assert update["planned"]["phase"] == update["planned_most"]["phase"] == "update"
    assert update["planned"]["total"] < update["planned_most"]["total"], "of the rows that are rehearsed"
    assert told["phases"][0]["planned"] is told["phases"][0]["planned_most"] is None
    assert told["collectives"] == [{"kind": "allreduce_", "ranks": 2, "dtype": "float32", "calls": 1, "bytes": 32}]
    assert values["rules"] == {"an unknown number: 1": 7}


def test_fp8_is_the_planners_in_every_total_and_marked(plan):
    # 8-bit weights take as much as those of bf16; copies beside these come on top.
    copies = plan_of("model.layers=te", "model.fp8=tensorwise", "model.fp8_weights=false")
    found = Rehearsal(copies, (rank(peak=75.0),), (), STEP)
    added = found.fp8_bytes(found.ranks[0], found.ranks[0].phases[1])
    assert added > 5 * GIB
    assert found.too_full, "75 GiB alone would fit"
    text = printed(found)
    row = next(line for line in text.splitlines() if line.startswith("update"))
    assert row.split()[-6:-4] == [f"{added / GIB:.2f}", f"{75 + added / GIB:.2f}"]
    assert "FP8 and TransformerEngine: rehearsed with local layers" in text
    in_place = Rehearsal(
        plan_of("model.layers=te", "model.fp8=tensorwise", "model.fp8_weights=true"), (rank(),), (), STEP
    )
    assert in_place.fp8_bytes(in_place.ranks[0], in_place.ranks[0].phases[1]) == 0


def test_changed_settings_and_rows_of_the_data_are_told(plan):
    found = Rehearsal(plan, (rank(),), (), STEP, changes=("train.steps: 500 -> 2",), data=("9 rows",))
    text = printed(found)
    assert "- train.steps: 500 -> 2" in text
    assert "- 9 rows" in text
    assert as_json(found)["changes"] == ["train.steps: 500 -> 2"]
    assert as_json(found)["data"] == ["9 rows"]


def test_groups_of_which_one_rank_was_rehearsed_are_told(plan):
    words = "are compared with nobody's"
    alone, together = Rehearsal(plan, (rank(),), (), STEP), Rehearsal(plan, (rank(), rank()), (), STEP)
    assert words in " ".join(printed(alone).split())
    assert any(words in note for note in as_json(alone)["notes"])
    assert words not in " ".join(printed(together).split()), "--all-ranks"
    single = replace(plan, layout=replace(plan.layout, tensor=1, sequence=False))
    assert words not in " ".join(printed(Rehearsal(single, (rank(),), (), STEP)).split()), "it has no such groups"


def test_weights_that_no_folder_has_shown_are_told(plan):
    words = "no folder of the model was looked at"
    found = Rehearsal(plan, (rank(),), (), STEP)
    assert words not in " ".join(printed(found).split())
    assert words in " ".join(printed(replace(found, makes_weights=True)).split())


def test_steps_of_the_engine_are_told(plan):
    assert "engine steps: 2 evicted, 7 mixed" in printed(
        Rehearsal(plan, (rank(engine_steps={"mixed": 7, "evicted": 2}),), (), STEP)
    )


def test_the_planner_says_today_what_the_pages_show_of_it():
    """The rehearsed figures beside them were measured once."""
    plan = plan_of("generation.kv_cache_gib=auto", "generation.cuda_graphs=auto", memory=79.6)
    step = plan_step(plan.work, plan.layout)
    planned, most = (
        {each.phase: f"{each.total / GIB:.2f}" for each in ranks if each.stage == 0}
        for ranks in (plan_as_rehearsed(plan, step), plan.memory.ranks)
    )
    flops = {phase: f"{value / 1e12:.1f}" for phase, value in planned_flops(plan, step, 0).items()}
    for page in ("README.md", "docs/rehearsal.md"):
        table = (ROOT / page).read_text().split("phase           params")[1].split("```")[0].splitlines()
        rows = [line.split() for line in table[1:] if line.split()[:1] and line.split()[0] in planned]
        assert len(rows) >= 2
        for phase, *figures in rows:
            assert figures[8:10] == [planned[phase], most[phase]]
            assert figures[11:] == ([flops[phase]] if phase in flops else [])
