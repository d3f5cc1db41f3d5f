"""Steps against their rehearsals, with models for a CPU; and what a device's allocator would be asked."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_step
from benchmarks.gpu_step import CASES, AllocatorWatch, compare, hf_config, prepare, rehearse
from megatron_r1v2.planning.plan import Plan, make_plan
from megatron_r1v2.rehearsal.ledger import PhaseMemory
from megatron_r1v2.rehearsal.preparation import Step
from megatron_r1v2.rehearsal.rank import RankResult
from megatron_r1v2.rehearsal.run import plan_as_rehearsed

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("case", "tiny"), [("thin", True), ("38b", True), ("38b-few", False)])
def test_a_step_on_a_cpu_takes_what_its_rehearsal_says(tmp_path: Path, case: str, tiny: bool) -> None:
    rehearsal, output = tmp_path / "rehearsal.json", tmp_path / "found.json"
    rehearse(case, rehearsal, tiny=tiny, device="cpu")
    command = [sys.executable, "-m", "benchmarks.gpu_step", "measure", case, str(rehearsal), "--output", str(output)]
    done = subprocess.run([*command, *(["--tiny"] if tiny else [])], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert found["error"] == ""
    assert found["metrics"]["step"] >= 1
    assert found["metrics"]["actor/grad_norm"] > 0, "an update was made"
    rows = {row["phase"]: row for row in found["phases"]}
    assert {"gate", "generate", "log_probs", "update", "save"} <= rows.keys()
    for name in ("generate", "log_probs", "update"):
        assert rows[name]["rehearsed / measured"] == pytest.approx(1, abs=0.01), name
    # With one update a step, old log-probs are those of the update's own forward, and nothing else is planned.
    for name in ("gate", "generate", "update", "evaluate"):
        assert rows[name]["planned"] > 0, name
    if CASES[case].decodes_all:
        lengths = found["metrics"]["response_length/mean"]
        assert lengths > 4


def test_what_is_known_is_told_as_phases_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit may end a step before its end; what it has measured counts."""

    def fail_in_update(spec, watch) -> RankResult:
        for name, size in (("load", 2**20), ("update", 2**22)):
            with watch.phase(name), watch:
                torch.zeros(size, dtype=torch.uint8)
        return RankResult(0, phases=watch.ledger.phases, error="out of memory", error_phase="update")

    monkeypatch.setattr(gpu_step, "rehearse_rank", fail_in_update)
    monkeypatch.setattr(gpu_step, "install_random_weights", lambda _: None)
    told = []
    figures = gpu_step.measure("thin", tmp_path / "none.json", tiny=True, on_figures=told.append)
    seen = [(known["phase"], [(row["phase"], row["measured"]) for row in known["phases"]]) for known in told]
    load, update = ("load", 2**20), ("update", 2**22)
    assert seen == [("load", []), ("start", [load]), ("update", [load]), ("start", [load, update])]
    assert figures["error"] == "update: out of memory"
    assert [row["measured"] for row in figures["phases"]] == [2**20, 2**22]


def test_a_thin_model_has_the_true_widths() -> None:
    whole, thin = (hf_config(replace(CASES["thin"], language_layers=n, vision_layers=n), tiny=False) for n in (0, 2))
    for part in ("text_config", "vision_config"):
        assert whole[part].pop("num_hidden_layers") > 40
        assert thin[part].pop("num_hidden_layers") == 2
    assert thin == whole


def test_a_model_for_a_cpu_has_the_true_widths_but_few_words() -> None:
    whole, few = (hf_config(CASES[case], tiny=False) for case in ("38b", "38b-few"))
    for config, words, layers in ((whole, 152_064, 64), (few, 8192, 2)):
        assert config["text_config"].pop("vocab_size") == words
        assert config["text_config"].pop("num_hidden_layers") == layers
        assert config.pop("image_token_id") < words
    assert whole["vision_config"].pop("num_hidden_layers") > few["vision_config"].pop("num_hidden_layers") == 2
    assert few == whole


def test_the_rehearsal_of_another_step_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rehearsal.json"
    file.write_text(json.dumps({"case": gpu_step._identity("thin", True), "phases": [["load", 7]]}))
    assert gpu_step._rehearsed_peaks("thin", file, tiny=True) == [("load", 7)]
    assert gpu_step._rehearsed_peaks("thin", tmp_path / "none.json", tiny=True) == []
    with pytest.raises(ValueError, match="is the rehearsal of \\['thin', True\\], or of other settings; make it again"):
        gpu_step._rehearsed_peaks("thin", file, tiny=False)
    monkeypatch.setitem(CASES, "thin", replace(CASES["thin"], vision_layers=5))
    with pytest.raises(ValueError, match="make it again"):
        gpu_step._rehearsed_peaks("thin", file, tiny=True)


def test_phases_get_the_peaks_of_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of those inside, and not of one that stands alone."""
    held, peak = [0], [0]

    def allocate(size: int) -> None:
        held[0] += size
        peak[0] = max(peak[0], held[0])

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, held[0]))
    watch = AllocatorWatch()
    with watch, watch.phase("step"):
        allocate(10)
        with watch.phase("generate"):
            allocate(50)
            allocate(-50)
        with watch.phase("update"):
            allocate(20)
            allocate(-5)
        with watch.phase_alone("load"):
            allocate(100)
            allocate(-100)
    found = {phase.name: (phase.held_before, phase.peak) for phase in watch.ledger.phases}
    assert found == {"step": (0, 60), "generate": (10, 60), "update": (10, 30), "load": (25, 125)}


def test_the_plan_is_of_the_rows_that_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the fullest step of the recipe, which has more of them."""
    plans: list[Plan] = []

    def make(*arguments) -> Plan:
        plans.append(make_plan(*arguments))
        return plans[-1]

    monkeypatch.setattr(gpu_step, "make_plan", make)
    spec, planned = prepare(CASES["thin"], tmp_path, tiny=True, device="cpu")
    (plan,) = plans
    step = Step(
        long=spec.rehearsed_prompts,
        short=0,
        mixed_groups=spec.mixed_groups,
        prompts_of_replica=spec.prompts_of_step,
        long_of_replica=spec.rehearsed_prompts,
    )
    assert planned == plan_as_rehearsed(plan, step)
    fullest = {each.phase: each.total for each in plan.memory.ranks}
    taken = {each.phase: each.total for each in planned}
    assert taken.keys() == fullest.keys()
    assert all(taken[phase] <= fullest[phase] for phase in taken)
    assert taken["update"] < fullest["update"]


def test_rows_are_compared_by_phase_and_order(tmp_path: Path) -> None:
    _, planned = prepare(CASES["thin"], tmp_path, tiny=True, device="cpu")
    measured = RankResult(0, phases=[PhaseMemory("load", 0, 100), PhaseMemory("update", 0, 200)])
    rows = compare(planned, [("load", 110), ("update", 190), ("load checkpoint", 5)], measured)
    assert rows[0] == {
        "phase": "load",
        "planned": None,
        "rehearsed": 110,
        "measured": 100,
        "rehearsed / measured": 1.1,
    }
    assert (rows[1]["rehearsed"], rows[1]["rehearsed / measured"]) == (190, 0.95)
    assert rows[1]["planned / measured"] == round(rows[1]["planned"] / 200, 4)
    assert compare(planned, [("update", 190)], measured)[0]["rehearsed"] is None
