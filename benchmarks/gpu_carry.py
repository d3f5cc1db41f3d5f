"""The needs of a GPU machine without a network beside the tree, in one folder: `make gpu-carry`, then carry `.gpu`.

python -m benchmarks.gpu_carry wheels          # .gpu/wheels: for Python 3.12 beside torch 2.11 and transformers
python -m benchmarks.gpu_carry demo            # .gpu/demo: from runs/digits, which `make demo` makes
python -m benchmarks.gpu_carry rehearsals      # .gpu/thin.json and .gpu/38b.json: minutes
python -m benchmarks.gpu_carry size            # of the tree with all that, which must stay below 64 MiB
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.gpu_report import CARRIED, ROOT
from megatron_r1v2.resilience.files import write_file

PYTHON = "3.12"
LIMIT = 64 * 2**20
PACKAGES = (
    "megatron-core",
    "megatron-energon",
    # energon imports it, and it all of these.
    "multi-storage-client",
    "attrs",
    "bracex",
    "cffi",
    "jmespath",
    "jsonschema",
    "jsonschema-specifications",
    "lark",
    "opentelemetry-api",
    "prettytable",
    "psutil",
    "pycparser",
    "pyroute2",
    "python-dateutil",
    "referencing",
    "rpds-py",
    "rapidyaml",
    "deprecation",
    "filetype",
    "mfusepy",
    "six",
    "tzdata",
    "wcmatch",
    "wcwidth",
    "xattr",
    "httpx",
    "httpcore",
    "certifi",
    "webdataset",
    "braceexpand",
    "einops",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "math-verify",
    "latex2sympy2-extended",
    "antlr4-python3-runtime",
    "pillow",
    "tenacity",
    "xxhash",
    "pytest",
    "pytest-timeout",
    "pluggy",
    "iniconfig",
)
"""The packages that the report imports beside those of torch and transformers; a test blocks all others."""
GIVEN = ("torch", "transformers", "pip", "setuptools")
"""The packages of the machine, with those that they require."""


def locked() -> dict[str, str]:
    """Return the versions of the lock file by canonical name."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}


def download_wheels(folder: Path, pip_arguments: Sequence[str] = ()) -> None:
    """Fill a folder with the wheels of PACKAGES in the versions of the lock file."""
    shutil.rmtree(folder, ignore_errors=True)
    versions = locked()
    names = [f"{name}=={versions[name]}" for name in PACKAGES]
    platforms = [f"--platform={tag}_x86_64" for tag in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *pip_arguments]
    subprocess.run([*command, f"--python-version={PYTHON}", *platforms, f"--dest={folder}", *names], check=True)


def copy_demo(made: Path, folder: Path) -> None:
    """Copy what GRPO of a made demo starts from: the base, the policy after MPO, its questions.

    Args:
        made: the folder of `make demo`.

    Raises:
        ValueError: there is no such demo.
    """
    from megatron_r1v2.checkpoint.megatron.run_folder import finished_checkpoints
    from megatron_r1v2.config.load import load_recipe, recipe_yaml

    checkpoints = finished_checkpoints(made / "mpo" / "checkpoints")
    if not checkpoints:
        raise ValueError(f"{made} holds no demo with a finished mpo stage; make demo makes it (or give --demo)")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made / "base", folder / "base")
    shutil.copytree(checkpoints[-1], folder / "mpo")
    shutil.copytree(made / "shards" / "grpo", folder / "shards")
    place = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder  # the tree is elsewhere on the device
    settings = (
        f"model.hf_path={place / 'base'}",
        f"model.checkpoint={place / 'mpo'}",
        f"data.train={place / 'shards'}",
    )
    recipe = load_recipe(ROOT / "examples" / "digits" / "grpo.yaml", settings)
    write_file(folder / "recipe.yaml", recipe_yaml(recipe))


def tree_bytes(carried: Path) -> int:
    """Return the size of the tree as it travels: what git tracks or would, and the carried folder."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0")
    files = [ROOT / name for name in names if name]
    files += [path for path in carried.rglob("*") if "site" not in path.relative_to(carried).parts[:1]]
    return sum(path.stat().st_size for path in files if path.is_file())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 where the tree has become too large."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_carry", description=__doc__)
    parser.add_argument("actions", nargs="+", choices=("wheels", "demo", "rehearsals", "size"))
    parser.add_argument("--demo", type=Path, default=ROOT / "runs" / "digits", help="the folder of `make demo`")
    parser.add_argument("--pip", default="", help="further arguments of pip download")
    arguments = parser.parse_args(argv)
    if "wheels" in arguments.actions:
        download_wheels(CARRIED / "wheels", arguments.pip.split())
    if "demo" in arguments.actions:
        copy_demo(arguments.demo, CARRIED / "demo")
    if "rehearsals" in arguments.actions:
        from benchmarks.gpu_step import CASES, rehearse

        for name in [name for name, case in CASES.items() if not case.for_cpu]:
            result = rehearse(name, CARRIED / f"{name}.json", tiny=False)
            print(f"{name}: rehearsed in {result.seconds:.0f} s")
    size = tree_bytes(CARRIED)
    print(f"the tree with {CARRIED.name}: {size / 2**20:.1f} MiB of {LIMIT / 2**20:.0f}")
    return 1 if size > LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
