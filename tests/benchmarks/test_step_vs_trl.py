"""The turns and the report of the comparison with TRL: missing turns only, in turns, medians and their ratio."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from benchmarks import decode
from benchmarks.step_cases import CASES, Case, Clock, Turn, pseudo
from benchmarks.step_ours import settings_of
from benchmarks.step_vs_trl import ROOT, expected_seconds, report, run_turns
from megatron_r1v2.config.load import load_recipe

CASE = CASES["33m-image64-response48-adapter"]


@pytest.fixture
def peers(tmp_path: Path) -> Path:
    """Return a python whose turns end at once, and say in which order they came."""
    program = tmp_path / "peers"
    log = tmp_path / "order"
    program.write_text(f'#!/bin/sh\nfor output; do :; done\necho "$5" >> {log}\necho "{{}}" > "$output"\n')
    program.chmod(0o755)
    return program


def test_systems_take_turns_and_only_missing_turns_are_done(tmp_path: Path, peers: Path) -> None:
    def run(until: float) -> bool:
        systems = ("trl", "loop")
        return run_turns(tmp_path, [CASE], label="a", turns=2, systems=systems, peers=peers, until=until)

    assert not run(time.monotonic()), "no turn is begun that would not end in time"
    assert run(time.monotonic() + 1000)
    assert (tmp_path / "order").read_text().split() == ["trl", "loop", "trl", "loop"]
    (tmp_path / "turns" / f"a-{CASE.name}-loop-0.json").unlink()
    assert run(time.monotonic() + 1000)
    assert (tmp_path / "order").read_text().split()[4:] == ["loop"]
    turn = tmp_path / "turns" / f"a-{CASE.name}-loop-1.json"
    assert json.loads(turn.read_text())["seconds"] >= 0
    turn.write_text('{"seconds": 500}')
    assert expected_seconds(tmp_path, CASE, "loop") == 500
    assert len(list((tmp_path / "turns").iterdir())) == 4, "nothing unfinished is left"


def test_a_turn_that_is_interrupted_leaves_no_process_and_no_result(tmp_path: Path) -> None:
    """The program ends by SIGTERM while its turn runs, with a worker of its own."""
    pids = tmp_path / "pids"
    peers = tmp_path / "peers"
    peers.write_text(f"#!/bin/sh\nsleep 600 &\necho $$ $! > {pids}.new\nmv {pids}.new {pids}\nwait\n")
    peers.chmod(0o755)
    (tmp_path / CASE.data).mkdir()
    command = [sys.executable, "-m", "benchmarks.step_vs_trl", "--work", str(tmp_path), "--peers", str(peers)]
    command += ["--cases", CASE.name, "--systems", "trl", "--output", str(tmp_path / "report.json")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 240
        while not pids.exists() and time.monotonic() < until:
            time.sleep(0.05)
        process.terminate()
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "run the same command again" in errors
    for pid in pids.read_text().split():
        assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    assert not list((tmp_path / "turns").iterdir())


def test_a_report_has_medians_over_the_steps_of_all_turns(tmp_path: Path) -> None:
    (tmp_path / "turns").mkdir()
    for system, number, seconds in (("ours", 0, (1, 9)), ("ours", 1, (3,)), ("trl", 0, (4, 8, 6)), ("loop", 0, (2,))):
        turn = Turn(system, CASE.name, {"of": system}, [{"step": float(each), "update": 1.0} for each in seconds])
        turn.write(tmp_path / "turns" / f"a-{CASE.name}-{system}-{number}.json")
        turn.write(tmp_path / "turns" / f"other-{CASE.name}-{system}-{number}.json")
    found = report(tmp_path, "a")[CASE.name]
    assert found["cpu_seconds_and_wall"]["ours"] == {"steps": 3, "step": 3.0, "update": 1.0}
    assert found["ours_of"] == {"trl": 0.5, "loop": 1.5}
    assert found["at_most"] == {"trl": 0.8, "loop": 1.0}
    assert found["settings"]["loop"] == {"of": "loop"}


def test_rates_of_generation_are_compared_by_responses_in_flight(tmp_path: Path) -> None:
    (tmp_path / "decode").mkdir()
    for system, in_flight, rates in (("ours", 8, [30, 60]), ("transformers", 8, [90]), ("ours", 1, [5])):
        turn = {"system": system, "in_flight": in_flight, "tokens_a_cpu_second": rates}
        (tmp_path / "decode" / f"{system}-{in_flight}-0.json").write_text(json.dumps(turn))
    assert decode.report(tmp_path) == {
        "1": {"ours": 5},
        "8": {"ours": 45, "transformers": 90, "ours_of_transformers": 0.5},
    }


def test_a_clock_adds_the_blocks_of_a_phase_and_begins_each_step_at_zero() -> None:
    clock = Clock()
    for _ in range(2):
        for _ in range(2):
            with clock.timed("wait"):
                time.sleep(0.02)
        clock.end_step()
    assert len(clock.steps) == 2
    for step in clock.steps:
        assert 0.04 <= step["wait_wall"] < 1
        assert step["wait"] < step["wait_wall"], "sleep costs no CPU"


def test_cases_have_names_of_their_own_and_the_peers_need_none_of_our_packages() -> None:
    assert {case.name for case in CASES.values()} == set(CASES)
    assert len(CASES) == 12
    assert pseudo("a") != pseudo("b")
    assert 0 <= pseudo("a") <= 1
    assert not any(name in Path(sys.modules[Turn.__module__].__file__ or "").read_text() for name in ("megatron_r1v2",))


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_the_settings_of_each_case_are_a_recipe(tmp_path: Path, case: Case) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings_of(tmp_path, case, tmp_path / "run")))
    assert load_recipe(tmp_path / "recipe.yaml").train.steps == 10_000
