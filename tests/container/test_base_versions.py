"""The versions of a base image are held: by the script alone, and by pip in an environment of its own."""

from __future__ import annotations

import fnmatch
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from container.base_versions import changes, constraints, installed, main, to_lines

SCRIPT = Path(__file__).parents[2] / "container" / "base_versions.py"


def test_what_has_changed_is_named() -> None:
    before = to_lines({"torch": "2.10.0a0+nv25.12", "apex": "0.1", "flash-attn": "2.7.4"})
    after = {"torch": "2.13.0", "flash-attn": "2.7.4", "transformer-engine": "2.11.0"}
    assert changes(before, after) == [
        "apex was 0.1 in the base image and is gone now",
        "torch was 2.10.0a0+nv25.12 in the base image and is 2.13.0 now",
    ]
    assert changes(before, {"torch": "2.10.0a0+nv25.12", "apex": "0.1", "flash-attn": "2.7.4"}) == []


def test_the_versions_of_this_environment_are_found_and_unchanged(tmp_path: Path) -> None:
    assert {"torch", "numpy"} <= installed().keys()
    assert main(["record", str(tmp_path / "versions")]) == 0
    assert main(["compare", str(tmp_path / "versions")]) == 0
    assert main(["compare"]) == 2


def write_distribution(folder: Path, name: str, version: str, requires: str = "") -> None:
    """Write a package that is its metadata and nothing else."""
    folder.mkdir()
    (folder / "pyproject.toml").write_text(
        f'[build-system]\nrequires=["setuptools"]\nbuild-backend="setuptools.build_meta"\n'
        f'[project]\nname="{name}"\nversion="{version}"\ndependencies=[{requires}]\n[tool.setuptools]\npy-modules=[]\n'
    )


def test_what_the_base_has_stays_and_the_rest_has_the_versions_of_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = "# NVIDIA's own\nPackaging==23.2  # old\nscipy<1.15\ntorch==2.10.0a0\n"
    held = "torch==2.10.0a0+nv25.12\n"
    lock = (
        "# ours\ntorch==2.13.0\nscipy==1.17.1\npackaging==26.3\npyyaml==6.0.3\nuvicorn==0.54.0 ; python_version > '3'\n"
    )
    expected = ["scipy<1.15", "torch==2.10.0a0+nv25.12", "packaging==26.3", "uvicorn==0.54.0 ; python_version > '3'"]
    assert constraints(base, held, lock, {"torch", "packaging", "pyyaml"}).splitlines() == expected
    files = {"base": base, "held": held, "lock": lock}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "base"))
    assert main(["constrain", str(tmp_path / "held"), str(tmp_path / "lock")]) == 0
    # This environment has uvicorn and PyYAML, the base of the example has not.
    assert capsys.readouterr().out.splitlines() == expected[:3]
    assert main(["constrain", str(tmp_path / "held")]) == 2


def test_the_image_has_the_extras_and_the_versions_of_the_lock() -> None:
    text = (SCRIPT.parents[1] / "Dockerfile").read_text()
    assert 'pip install --no-cache-dir --no-build-isolation -e ".[serve,evaluation]"' in text
    assert "PIP_CONSTRAINT=/etc/r1v2-constraints.txt" in text
    assert "constrain /etc/base-versions.txt requirements.lock > /etc/r1v2-constraints.txt" in text
    assert "driver 580" in text


def test_the_image_has_nothing_that_git_ignores() -> None:
    """Among it wheels and data for a GPU without a network, runs, environments."""
    root = SCRIPT.parents[1]
    left_out = [line.removeprefix("**/") for line in (root / ".dockerignore").read_text().splitlines()]
    names = [line.rstrip("/").replace("*", "any") for line in (root / ".gitignore").read_text().splitlines()]
    assert ".gpu" in names
    assert [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in left_out)] == []


@pytest.mark.slow
def test_pip_keeps_to_the_recorded_versions_and_a_change_is_noticed(tmp_path: Path) -> None:
    """apex, as a base image has it, and a package that wants a newer one: pip refuses; forced, the build would fail."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True, system_site_packages=False)
    python = environment / "bin" / "python"
    wheels = tmp_path / "wheels"
    for name, version, requires in (("apex", "0.1", ""), ("apex", "0.2", ""), ("ours", "1.0", '"apex>=0.2"')):
        source = tmp_path / f"{name}-{version}"
        write_distribution(source, name, version, requires)
        build = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(wheels),
        ]
        subprocess.run([*build, str(source)], check=True)
    recorded = tmp_path / "versions.txt"

    def pip(*arguments: str) -> int:
        install = [python, "-m", "pip", "install", "--quiet", "--no-index", f"--find-links={wheels}", *arguments]
        return subprocess.run(install, check=False, capture_output=True).returncode

    def compare() -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, SCRIPT, "compare", recorded], check=False, capture_output=True, text=True)

    assert pip("apex==0.1") == 0
    subprocess.run([python, SCRIPT, "record", recorded], check=True)
    assert pip("--constraint", str(recorded), "ours") != 0
    assert compare().returncode == 0
    assert pip("ours") == 0
    done = compare()
    assert done.returncode == 1
    assert done.stderr == "apex was 0.1 in the base image and is 0.2 now\n"
