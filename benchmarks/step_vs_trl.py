"""CPU seconds of one GRPO step: ours, TRL's, and those of a loop written by hand with transformers.

    python -m venv PEERS && PEERS/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0
    python -m benchmarks.step_vs_trl --peers PEERS/bin/python --work WORK --demo runs/digits \\
        --cases 33m-image64-response48-adapter --output benchmarks/results/step_vs_trl_cpu.json

Each turn is a process of one system that does a few steps on one thread and writes their numbers into the work
folder; the systems take turns, so that a machine that gets slower or faster moves all of them. The report is written
after each turn. `--seconds` ends a run before the next turn would exceed it; the same command goes on from there, also
after it was interrupted: a turn is a process group of its own, which ends with it.

Cases are the demo's step (48 prompts, 0.58 M parameters) and one of a random InternVL of 33 M (hidden 512, 8 layers,
vocabulary 8192), with 100 tokens of text and template and 64, 256 or 1024 of an image before 8 responses of 48 or 200
tokens. Compute-matched: responses of full length, all of them trained, no buffer. A random model answers nothing right,
so only the demo has a case as a user configures it. The settings of every system are printed and in the report.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.step_cases import CASES, Case
from megatron_r1v2.resilience.files import write_file

SYSTEMS = ("ours", "trl", "loop")
ROOT = Path(__file__).parents[1]
_EXPECTED_SECONDS = 60.0
"""Of a turn of a case that has not been measured yet."""


def command_of(system: str, case: Case, work: Path, output: Path, peers: Path) -> list[str]:
    """Return the command of one turn."""
    numbers = [str(case.warmup), str(case.steps), str(output)]
    if system == "ours":
        return [sys.executable, "-m", "benchmarks.step_ours", str(work), case.name, *numbers]
    return [str(peers), "-m", "benchmarks.step_peers", str(work), case.name, system, *numbers]


def run_in_group(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a command in a process group that is gone when this returns or raises.

    Raises:
        CalledProcessError: the command failed.
    """
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            code = process.wait()
        finally:
            # Workers that check answers would outlive a turn that was killed, and take CPU from the next one.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if code:
        raise subprocess.CalledProcessError(code, command)


def run_turns(
    work: Path,
    cases: Sequence[Case],
    *,
    label: str,
    turns: int,
    systems: Sequence[str],
    peers: Path,
    until: float,
    on_turn: Callable[[], None] = lambda: None,
) -> bool:
    """Do the turns that are missing; return whether there are none left.

    Args:
        label: names our commit in the turns of ours, such as "before".
        until: of `time.monotonic`.
        on_turn: called after each turn.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    (work / "turns").mkdir(exist_ok=True)
    for case in cases:
        for turn in range(turns):
            for system in systems:
                output = work / "turns" / f"{label}-{case.name}-{system}-{turn}.json"
                if output.exists():
                    continue
                started = time.monotonic()
                if started + expected_seconds(work, case, system) > until:
                    return False
                # Under this name a turn that was cut is not taken for a whole one.
                partial = work / "turns" / f"unfinished-{system}.json"
                run_in_group(command_of(system, case, work, partial, peers), environment)
                seconds = time.monotonic() - started
                write_file(output, json.dumps({**json.loads(partial.read_text()), "seconds": round(seconds, 1)}))
                partial.unlink()
                print(f"{output.stem}: {seconds:.0f} s", flush=True)
                on_turn()
    return True


def expected_seconds(work: Path, case: Case, system: str) -> float:
    """Return how long the longest turn of a system took in a case, whatever its label."""
    turns = [json.loads(path.read_text()) for path in (work / "turns").glob(f"*-{case.name}-{system}-*.json")]
    return max((float(turn.get("seconds", 0)) for turn in turns), default=0) or _EXPECTED_SECONDS


def report(work: Path, label: str) -> dict[str, Any]:
    """Return medians of all steps of each case and system, and ours against the others'."""
    steps: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    settings: dict[str, dict[str, object]] = defaultdict(dict)
    for path in sorted((work / "turns").glob(f"{label}-*.json")):
        turn = json.loads(path.read_text())
        steps[turn["case"]][turn["system"]] += turn["steps"]
        settings[turn["case"]][turn["system"]] = turn["settings"]
    found: dict[str, Any] = {}
    for name, systems in steps.items():
        medians = {
            system: {"steps": len(each), **{key: _median(each, key) for key in sorted({*each[0], *each[-1]})}}
            for system, each in systems.items()
        }
        found[name] = {
            "cpu_seconds_and_wall": medians,
            "ours_of": {
                system: round(medians["ours"]["step"] / numbers["step"], 3)
                for system, numbers in medians.items()
                if system != "ours" and "ours" in medians
            },
            "at_most": dict(CASES[name].at_most),
            "settings": settings[name],
        }
    return found


def print_report(found: Mapping[str, Any]) -> None:
    """Print settings, then CPU seconds of a step by system, and ours against the others' with the bounds."""
    for name, case in found.items():
        for system, settings in case["settings"].items():
            print(f"{name} {system}: {json.dumps(settings)}")
    for name, case in found.items():
        seconds = {system: numbers["step"] for system, numbers in case["cpu_seconds_and_wall"].items()}
        print(f"{name}: CPU seconds {json.dumps(seconds)}")
        print(f"  ours of {json.dumps(case['ours_of'])}, wanted at most {json.dumps(case['at_most'])}")


def _median(steps: Sequence[dict[str, float]], key: str) -> float:
    return round(statistics.median(step.get(key, 0.0) for step in steps), 3)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models, prompts and finished turns")
    parser.add_argument("--peers", type=Path, required=True, help="python of an environment with TRL")
    parser.add_argument("--demo", type=Path, help="folder of make demo, with its model before GRPO in export/")
    parser.add_argument(
        "--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="CASE", help="%(choices)s"
    )
    parser.add_argument("--systems", nargs="*", default=SYSTEMS, choices=SYSTEMS)
    parser.add_argument("--turns", type=int, default=3, help="of each system")
    parser.add_argument("--label", default="now", help="of our commit, such as before and after")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no turn that would end later")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    cases = [CASES[name] for name in options.cases]
    options.work.mkdir(exist_ok=True, parents=True)
    until = time.monotonic() + options.seconds
    missing = [case for case in cases if not (options.work / case.data).exists()]
    if missing:
        from benchmarks.step_materials import make_materials

        for case in missing:
            make_materials(options.work.resolve(), case, options.demo and options.demo.resolve())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM: run the same command again"))
    work, load = options.work.resolve(), os.getloadavg()[0]

    def write(*, finished: bool = False) -> None:
        if options.output:
            machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "threads": 1}
            machine["load_average"] = [round(load, 1), round(os.getloadavg()[0], 1)]
            content = {
                "machine": machine,
                "finished": finished,
                "label": options.label,
                "cases": report(work, options.label),
            }
            write_file(options.output, json.dumps(content, indent=1) + "\n")

    finished = run_turns(
        work,
        cases,
        label=options.label,
        turns=options.turns,
        systems=options.systems,
        peers=options.peers.absolute(),
        until=until,
        on_turn=write,
    )
    write(finished=finished)
    print_report(report(work, options.label))
    if not finished:
        print("turns are missing: run the same command again")


if __name__ == "__main__":
    main()
