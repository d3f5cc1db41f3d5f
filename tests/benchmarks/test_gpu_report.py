"""The report runs on a CPU at small sizes, with no package that a bare GPU machine would not have."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks import gpu_report
from benchmarks.gpu_carry import GIVEN, PACKAGES
from benchmarks.gpu_report import PARTS, WHOLE_MODEL, Part, Place, Report, install_wheels, missing_packages, run_part

ROOT = Path(__file__).parents[2]
HEAVY = {"pyarrow", "scipy", "sklearn", "pandas", "wandb"}
BLOCKER = """
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        # Not an error: who only asks whether a package is there must hear that it is not.
        return None if name.partition(".")[0] in BLOCKED else super().find_spec(name, path, target)

sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""


def closure(names: tuple[str, ...]) -> set[str]:
    """Return distributions with all that they require, without extras."""
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(requirement.name))
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """Return a folder that, on PYTHONPATH, hides every package but those that a bare machine has or is brought."""
    allowed = closure(GIVEN) | {canonicalize_name(name) for name in PACKAGES} | {"megatron-r1v2"}
    blocked = {
        module
        for module, names in metadata.packages_distributions().items()
        if not allowed & {canonicalize_name(name) for name in names}
    }
    assert blocked >= HEAVY & metadata.packages_distributions().keys()
    assert "pyarrow" in blocked
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(f"BLOCKED = {sorted(blocked)}\n{BLOCKER}")
    return folder


def run_bare(bare: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{bare}:{ROOT}"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_whole_report_on_a_cpu_without_other_packages(tmp_path: Path, bare: Path) -> None:
    from benchmarks.gpu_step import rehearse
    from megatron_r1v2.config.load import recipe_yaml
    from tests.stages.tiny_run import tiny_recipe

    carried, results = tmp_path / "carried", tmp_path / "results"
    (carried / "demo").mkdir(parents=True)
    (carried / "demo" / "recipe.yaml").write_text(recipe_yaml(tiny_recipe(tmp_path / "tiny", steps=2)))
    rehearse("thin", carried / "thin-tiny.json", tiny=True, device="cpu")
    command = ("benchmarks.gpu_report", "--on-cpu", "--results", str(results), "--carried", str(carried))
    done = run_bare(bare, sys.executable, "-m", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in results.iterdir()] == ["gpu-cpu.json"]
    found = json.loads((results / "gpu-cpu.json").read_text())
    assert list(found) == ["environment", *(part.name for part in PARTS)]
    assert {entry["status"] for entry in found.values()} == {"done"}
    outcomes = found["tests"]["found"]
    assert len(outcomes) == 2
    assert {outcome["outcome"] for outcome in outcomes.values()} == {"passed"}
    assert [line["step"] for line in found["demo"]["found"]["steps"]] == [1, 2]
    assert found["slices"]["found"]["language"]["decode"]["tokens/s"] > 0
    phases = {row["phase"]: row for row in found["memory"]["found"]["phases"]}
    assert {"generate", "update", "save"} <= phases.keys()
    for name in ("generate", "log_probs", "update"):
        assert phases[name]["rehearsed / measured"] == pytest.approx(1, abs=0.01), name
    # With one update a step, old log-probs are those of the update's own forward, and nothing else is planned.
    for name in ("gate", "generate", "update", "evaluate"):
        assert phases[name]["planned"] > 0, name


@pytest.mark.slow
def test_nothing_that_a_part_imports_is_missing_on_a_bare_machine(tmp_path: Path, bare: Path) -> None:
    """Of our modules, megatron-core's that they import, and the tests'."""
    done = run_bare(bare, sys.executable, "-m", "benchmarks.gpu_report", "--environment", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stderr
    missing = json.loads((tmp_path / "found.json").read_text())["missing"]
    assert [text for text, needed in missing.items() if needed] == []
    assert any("uvicorn" in text or "starlette" in text for text in missing), "what serving lacks is told"
    code = "import benchmarks.gpu_step, benchmarks.gpu_slices, tests.gpu.on_device, tests.gpu.test_stages"
    done = run_bare(bare, sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


def test_a_package_that_is_missing_is_named_with_the_module_that_wants_it(monkeypatch, tmp_path) -> None:
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name == "einops":
                raise ModuleNotFoundError("No module named 'einops'", name="einops")

    for name in [name for name in sys.modules if name.startswith(("megatron_r1v2.models.rotary", "einops"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Blocker(), *sys.meta_path])
    monkeypatch.setattr(
        gpu_report.pkgutil, "walk_packages", lambda *_: [type("M", (), {"name": "megatron_r1v2.wants_einops"})]
    )
    package = tmp_path / "wants_einops.py"
    package.write_text("import einops\n")
    import megatron_r1v2

    monkeypatch.setattr(megatron_r1v2, "__path__", [*megatron_r1v2.__path__, str(tmp_path)])
    assert missing_packages() == {
        "megatron_r1v2.wants_einops needs einops, imported by megatron_r1v2.wants_einops": True
    }


SLOW_PART = """
import json, pathlib, sys, time
for number in range(3):
    pathlib.Path(sys.argv[1] + ".new").write_text(json.dumps({"number": number}))
    pathlib.Path(sys.argv[1] + ".new").rename(sys.argv[1])
    time.sleep(0.5)
print("the last line")
if "hang" in sys.argv:
    time.sleep(60)
sys.exit(int("fail" in sys.argv))
"""


@pytest.mark.parametrize(
    ("how", "status"), [("", "done"), ("fail", "failed with status 1"), ("hang", "ended after 4 s, its limit")]
)
def test_a_part_ends_in_time_and_what_it_has_written_counts(tmp_path: Path, how: str, status: str) -> None:
    part = Part("slow", 4, lambda place: ["-c", SLOW_PART, str(place.output), how])
    found: list[object] = []
    ended = run_part(part, Place(tmp_path / "slow.json", tmp_path, True), found.append)
    assert ended["status"] == status
    assert found == [{"number": 0}, {"number": 1}, {"number": 2}], "as they come"
    assert ended["seconds"] < 10
    assert ("log" in ended) == (status != "done")
    assert how != "fail" or ended["log"] == ["the last line"]
    needy = Part("needy", 4, part.command, needs="demo")
    assert run_part(needy, Place(tmp_path / "n.json", tmp_path, True), found.append)["status"].startswith("not run")


ENDED_FROM_OUTSIDE = """
import sys
from pathlib import Path
from benchmarks.gpu_report import Part, Place, end_parts_at_sigterm, run_part

end_parts_at_sigterm()
folder = Path(sys.argv[1])
program = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'w')); time.sleep(600)"
part = Part("slow", 500, lambda place: ["-c", program, str(folder / "pid")])
run_part(part, Place(folder / "found.json", folder, True), lambda _: None)
"""


def test_a_report_that_is_ended_leaves_no_part_behind(tmp_path: Path) -> None:
    report = subprocess.Popen([sys.executable, "-c", ENDED_FROM_OUTSIDE, str(tmp_path)], cwd=ROOT)
    pid = tmp_path / "pid"
    wait_until(lambda: pid.is_file() and pid.read_text().endswith("\n"))
    report.terminate()
    assert report.wait(timeout=120) == 128 + signal.SIGTERM
    wait_until(lambda: not Path("/proc", pid.read_text().strip()).exists())


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 240
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_busy_cpu_ends_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.dumps({"device": "CPU", "memory": None})
    environment = Part("environment", 20, lambda place: ["-c", f"open({str(place.output)!r}, 'w').write({found!r})"])
    monkeypatch.setattr(gpu_report, "ENVIRONMENT", environment)
    part = Part("late", 1, lambda place: ["-c", "import time; time.sleep(1.5)"])
    file = gpu_report.report([part], tmp_path / "results", tmp_path, on_cpu=True)
    assert json.loads(file.read_text())["late"]["status"] == "done"


def test_a_model_that_the_device_cannot_hold_is_not_begun(tmp_path: Path) -> None:
    part = Part("large", 4, lambda place: ["-c", ""], needs_gib=110)
    for memory, status in (
        (80 * 2**30, "not run: it needs a GPU with 110 GiB of memory, this device has 80"),
        (139 * 2**30, "done"),
        (None, "done"),
    ):
        place = Place(tmp_path / "found.json", tmp_path, memory is None)
        assert run_part(part, place, lambda _: None, memory=memory)["status"] == status


def test_steps_are_measured_at_sizes_for_their_device(tmp_path: Path) -> None:
    thin = next(part for part in PARTS if part.name == "memory")
    arguments = {
        (part.name, on_cpu): part.command(Place(tmp_path / "out.json", tmp_path, on_cpu))[3:]
        for part in (thin, WHOLE_MODEL)
        for on_cpu in (False, True)
    }
    output = f"--output={tmp_path / 'out.json'}"
    assert arguments == {
        ("memory", False): ["thin", str(tmp_path / "thin.json"), output],
        ("memory", True): ["thin", str(tmp_path / "thin-tiny.json"), output, "--tiny"],
        ("38b", False): ["38b", str(tmp_path / "38b.json"), output],
        ("38b", True): ["38b-few", str(tmp_path / "38b-few.json"), output],
    }


def test_the_file_is_whole_at_every_moment_and_keeps_other_parts(tmp_path: Path) -> None:
    first = Report(tmp_path, "NVIDIA H100 80GB HBM3")
    first.note("38b", {"status": "done"})
    second = Report(tmp_path, "NVIDIA H100 80GB HBM3")
    second.note("tests", {"found": 1})
    second.note("tests", {"status": "done"})
    assert second.file.name == "gpu-nvidia-h100-80gb-hbm3.json"
    assert json.loads(second.file.read_text()) == {"38b": {"status": "done"}, "tests": {"found": 1, "status": "done"}}


def test_the_report_takes_eight_minutes_at_most() -> None:
    before = gpu_report.UNPACKING_SECONDS + gpu_report.ENVIRONMENT.seconds
    assert before + sum(part.seconds for part in PARTS) <= 480
    assert before + WHOLE_MODEL.seconds <= 600


@pytest.mark.slow
def test_without_a_device_it_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--parts", "slices", "--results", str(tmp_path)]
    command += ["--carried", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "there is no CUDA device; --on-cpu tries the report at small sizes" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_tests_that_say_most_come_first() -> None:
    from tests.gpu.conftest import FIRST

    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    places = [max(place for place, name in enumerate(names) if name.startswith(first)) for first in FIRST]
    assert places == sorted(places)
    assert max(places) < len(names) - 5


def test_wheels_are_unpacked_once_and_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    install_wheels(tmp_path / "none", tmp_path / "site")
    assert os.environ["PYTHONPATH"] == "elsewhere"
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "here = 1\n")
        wheel.writestr("carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr("carried-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("carried-1.0.dist-info/RECORD", "")
    for _ in range(2):
        install_wheels(wheels, tmp_path / "site")
    assert (tmp_path / "site" / "carried.py").read_text() == "here = 1\n"
    assert os.environ["PYTHONPATH"].startswith(f"{tmp_path / 'site'}:")
