"""All that a lent or rented GPU is asked, in one command of at most 8 minutes: `make gpu-report`.

environment   versions, the device, and packages that are missing, with the module that wants them
tests         tests/gpu, the most important first
demo          GRPO of examples/digits on the device, on data that `make gpu-carry` has put beside it
slices        layers of true width against measured ceilings (gpu_slices.py)
memory        a whole step of a thin model of true width against its rehearsal and the plan (gpu_step.py)

Each part is a process of its own with a time limit of its own, and fails alone. What is known is in
benchmarks/results/gpu-DEVICE.json at every moment. A bare machine where nothing can be fetched needs Python 3.12, torch
and transformers: the rest comes as wheels from `make gpu-carry`. `--on-cpu` runs everything here, at small sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_r1v2.resilience.files import write_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CARRIED = ROOT / ".gpu"
"""The contents that `make gpu-carry` makes: wheels/, demo/, thin.json, 38b.json."""
_LOG_LINES = 30
_PATIENCE_ON_CPU = 5
_NOT_NEEDED = (
    "serve",
    "evaluation.lm_eval",
    "evaluation.benchmarks",
    "evaluation.bfcl",
    "rewards.served_model",
    "report",
    "stages.prepare",
)
"""Modules of the package that no part runs; what they lack is said, and stops nothing."""


@dataclass(frozen=True)
class Place:
    """The files of one part, and its sizes."""

    output: Path
    """The part writes what it has found there, again and again."""
    carried: Path
    on_cpu: bool


@dataclass(frozen=True)
class Part:
    """One part of the report."""

    name: str
    seconds: int
    """After which it is ended; what it has written by then counts."""
    command: Callable[[Place], Sequence[str]]
    """Returns the arguments of Python."""
    needs: str = ""
    """A path in the folder of carried things without which it does not start."""
    needs_gib: int = 0
    """Memory of a GPU without which it does not start."""


def _tests(place: Place) -> list[str]:
    # On a CPU the bodies of two, to try the report.
    on_cpu = ["--gpu-tests-on-cpu", "-k", "shared_rows_in_fp32 or (same_before_and_after and fp32)"]
    command = ["-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
    command.append(f"--outcomes={place.output}")
    return command + (on_cpu if place.on_cpu else [])


def _demo(place: Place) -> list[str]:
    steps = "2" if place.on_cpu else "12"
    return ["-m", "benchmarks.gpu_demo", str(place.carried / "demo"), str(place.output), "--steps", steps]


def _slices(place: Place) -> list[str]:
    return ["-m", "benchmarks.gpu_slices", "--output", str(place.output), *(["--tiny"] if place.on_cpu else [])]


def _step(case: str, *, on_cpu: str, tiny: bool) -> Callable[[Place], list[str]]:
    """Return the command that measures a case.

    Args:
        on_cpu: the case in its place on a CPU.
        tiny: whether that has small widths.
    """

    def command(place: Place) -> list[str]:
        name, options = (on_cpu, ["--tiny"] if tiny else []) if place.on_cpu else (case, [])
        rehearsal = place.carried / f"{name}{'-tiny' if options else ''}.json"
        return ["-m", "benchmarks.gpu_step", "measure", name, str(rehearsal), f"--output={place.output}", *options]

    return command


ENVIRONMENT = Part("environment", 60, lambda place: ["-m", "benchmarks.gpu_report", "--environment", str(place.output)])
UNPACKING_SECONDS = 15
"""Of the wheels, before the first part."""
PARTS = (
    Part("tests", 140, _tests),
    Part("demo", 65, _demo, needs="demo"),
    Part("slices", 110, _slices),
    Part("memory", 90, _step("thin", on_cpu="thin", tiny=True)),
)
# The planner: 101 GiB for the recipe, of which 72 are weights.
WHOLE_MODEL = Part("38b", 525, _step("38b", on_cpu="38b-few", tiny=False), needs_gib=110)


def run_part(part: Part, place: Place, found: Callable[[object], None], *, memory: int | None = None) -> dict[str, Any]:
    """Run a part to its end or its limit.

    Args:
        found: called with what it has written whenever there is more.
        memory: bytes of the GPU; None: a CPU.

    Returns:
        How it ended, and the end of its log where it did not end well.
    """
    if part.needs and not (place.carried / part.needs).exists():
        return {"status": f"not run: {place.carried / part.needs} is not there, make gpu-carry brings it"}
    if memory is not None and memory < part.needs_gib * 2**30:
        has = f"this device has {memory / 2**30:.0f}"
        return {"status": f"not run: it needs a GPU with {part.needs_gib} GiB of memory, {has}"}
    log = place.output.with_suffix(".log")
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *part.command(place)],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            # Its own group: what it has started ends with it.
            start_new_session=True,
        )
        seen = b""
        try:
            while process.poll() is None and time.monotonic() - start < part.seconds:
                time.sleep(0.2)
                seen = _tell_news(place.output, seen, found)
        finally:
            in_time = process.poll() is not None
            _end(process)
    _tell_news(place.output, seen, found)
    ended: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1)}
    if not in_time:
        ended["status"] = f"ended after {part.seconds} s, its limit"
    else:
        ended["status"] = "done" if process.returncode == 0 else f"failed with status {process.returncode}"
    if ended["status"] != "done":
        ended["log"] = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    return ended


def _tell_news(output: Path, seen: bytes, found: Callable[[object], None]) -> bytes:
    content = output.read_bytes() if output.is_file() else b""
    if content != seen:
        found(json.loads(content))
    return content


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def end_parts_at_sigterm() -> None:
    """Let a limit from outside end the part that runs too: in a session of its own, it would keep the device."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


class Report:
    """The file of a report, whole at every moment."""

    def __init__(self, folder: Path, device: str) -> None:
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        self.file = folder / f"gpu-{name}.json"
        # Another command may have measured on the same device before: its parts stay.
        self.content: dict[str, Any] = json.loads(self.file.read_text()) if self.file.is_file() else {}

    def note(self, part: str, content: Mapping[str, object]) -> None:
        """Add to a part and write the file."""
        self.content[part] = {**self.content.get(part, {}), **content}
        write_file(self.file, json.dumps(self.content, indent=1) + "\n")


def report(parts: Sequence[Part], results: Path, carried: Path, *, on_cpu: bool) -> Path:
    """Run parts one after the other and return the file with what they found.

    Raises:
        RuntimeError: the environment lacks a package that is needed, or there is no device.
    """
    with tempfile.TemporaryDirectory(prefix="r1v2-gpu-report-") as work:

        def run(part: Part, found: Callable[[object], None], memory: int | None = None) -> dict[str, Any]:
            if on_cpu:  # a busy one is no reason to end a part
                part = replace(part, seconds=_PATIENCE_ON_CPU * part.seconds)
            print(f"{part.name}: at most {part.seconds} s", flush=True)
            ended = run_part(part, Place(Path(work) / f"{part.name}.json", carried, on_cpu), found, memory=memory)
            print(f"{part.name}: {ended['status']}", *ended.get("log", []), sep="\n    ", flush=True)
            return ended

        contents: list[Any] = [{}]
        ended = run(ENVIRONMENT, contents.append)
        environment = contents[-1]
        missing = environment.get("missing", {})
        print(*missing, sep="\n")
        if "device" not in environment or any(missing.values()):
            raise RuntimeError(f"the environment cannot run the report ({ended['status']}); see above")
        if environment["device"] == "CPU" and not on_cpu:
            raise RuntimeError("there is no CUDA device; --on-cpu tries the report at small sizes")
        file = Report(results, environment["device"])
        for part in parts:
            file.content.pop(part.name, None)  # of an earlier report
        file.note("environment", {**environment, **ended})
        for part in parts:

            def note(content: object, name: str = part.name) -> None:
                file.note(name, {"found": content})

            file.note(part.name, run(part, note, environment["memory"]))
    return file.file


def describe_environment() -> dict[str, Any]:
    """Return versions, the device, and what cannot be imported: a sentence, and whether a part needs it."""
    import torch

    versions = {}
    for name in ("torch", "transformers", "megatron-core", "transformer_engine", "flash-attn"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "memory": torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None,
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda,
        "versions": versions,
        "missing": missing_packages(),
    }


def missing_packages() -> dict[str, bool]:
    """Import every module of the package, and return a sentence for each package that is missing.

    megatron-core imports much that it does not require; where such an import is not guarded, it shows here.

    Returns:
        Sentence to whether a part needs the module.
    """
    import megatron_r1v2

    found: dict[str, bool] = {}
    for each in pkgutil.walk_packages(megatron_r1v2.__path__, "megatron_r1v2."):
        if each.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(each.name)
        except ImportError as error:
            needed = not each.name.removeprefix("megatron_r1v2.").startswith(_NOT_NEEDED)
            frames = [
                frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"
            ]
            place = frames[-1].f_globals["__name__"] if frames else each.name
            found[f"{each.name} needs {error.name or error}, imported by {place}"] = needed
    return found


def install_wheels(wheels: Path, site: Path) -> None:
    """Unpack carried wheels beside the packages of this machine, once, and let all processes find them first."""
    if not any(wheels.glob("*.whl")):
        return
    if not site.is_dir():
        partial = site.with_name(".site.partial")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*pip, "--target", str(partial), *map(str, sorted(wheels.glob("*.whl")))], check=True)
        partial.rename(site)
    _prepend_path(site)


def _prepend_path(folder: Path) -> None:
    """Let the processes of the parts find modules in a folder first."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 where a part did not end well."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("--on-cpu", action="store_true", help="try the report where there is no GPU, at small sizes")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="only these")
    parser.add_argument("--38b", dest="whole", action="store_true", help="one step of the whole model, nothing else")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the file; default: %(default)s")
    parser.add_argument("--carried", type=Path, default=CARRIED, help="what is carried; default: %(default)s")
    parser.add_argument("--environment", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.environment is not None:
        write_file(arguments.environment, json.dumps(describe_environment()))
        return 0
    end_parts_at_sigterm()
    carried = arguments.carried.absolute()
    os.environ.setdefault("OMP_NUM_THREADS", "1" if arguments.on_cpu else "4")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Those of the machine are made for its own pytest, not for the one that is carried.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    _prepend_path(ROOT)
    if not arguments.on_cpu:
        install_wheels(carried / "wheels", carried / "site")
    parts = [part for part in PARTS if arguments.parts is None or part.name in arguments.parts]
    if arguments.whole:
        parts = [WHOLE_MODEL]
    try:
        file = report(parts, arguments.results.absolute(), carried, on_cpu=arguments.on_cpu)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written to {file}")
    content = json.loads(file.read_text())
    return 0 if all(content[part.name]["status"] == "done" for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
