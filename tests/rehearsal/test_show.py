"""The print-out of a rehearsal and its verdict."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from megatron_r1v2.planning.memory import GIB
from megatron_r1v2.rehearsal.collectives import Collective
from megatron_r1v2.rehearsal.ledger import PhaseMemory
from megatron_r1v2.rehearsal.rank import RankResult
from megatron_r1v2.rehearsal.run import Rehearsal
from megatron_r1v2.rehearsal.show import NOT_PROVEN, as_json, print_rehearsal
from tests.planning.plans import plan_of


@pytest.fixture(scope="module")
def plan():
    return plan_of()


def rank(peak=20.0, **changes):
    phases = [
        PhaseMemory("start", 0, int(peak * GIB)),
        PhaseMemory("update", 0, int(peak * GIB), at_peak={"activations": GIB}, line="models/mlp.py:7 forward"),
    ]
    result = RankResult(
        0,
        place="stage 0, TP 0, DP 0",
        phases=phases,
        flops={"update": 3 * 10**12},
        collectives=[Collective("allreduce_", (0, 1), "float32", 8, 32)],
        questions=[("an unknown number: 1", "somewhere", 4)],
    )
    return replace(result, **changes)


def printed(found):
    console = Console(file=io.StringIO(), width=120)
    print_rehearsal(found, console)
    return console.file.getvalue()


def test_it_prints_peaks_beside_the_plan_with_lines_rules_and_limits(plan):
    text = printed(Rehearsal(plan, (rank(),), ()))
    planned = next(each for each in plan.memory.ranks if each.phase == "update").total / GIB
    row = next(line for line in text.splitlines() if line.startswith("update"))
    assert row.split()[-4:] == ["1.00", "20.00", f"{planned:.2f}", "3.0"]
    assert "fullest in update: models/mlp.py:7 forward" in text
    assert "allreduce_" in text
    assert "- an unknown number: 1 (4)" in text
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
    found = Rehearsal(plan, (rank(**changes),), mismatches)
    assert not found.passed
    text = printed(found)
    assert words in text
    assert all(each in text for each in (*mismatches, changes.get("error", "")))


def test_json_has_the_same_in_bytes(plan):
    values = as_json(Rehearsal(plan, (rank(),), ()))
    assert values["passed"] is True
    (told,) = values["ranks"]
    update = told["phases"][1]
    assert update["peak"] == 20 * GIB
    assert update["planned"]["phase"] == "update"
    assert told["phases"][0]["planned"] is None
    assert told["collectives"] == [{"kind": "allreduce_", "ranks": 2, "dtype": "float32", "calls": 1, "bytes": 32}]
    assert values["rules"] == {"an unknown number: 1": 4}


def test_fp8_is_marked_as_not_rehearsed():
    text = printed(Rehearsal(plan_of("model.layers=te", "model.fp8=tensorwise"), (rank(),), ()))
    assert "FP8 and TransformerEngine: rehearsed with local layers" in text
