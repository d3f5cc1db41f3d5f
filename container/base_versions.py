"""The versions of a container's base image: recorded as pip's constraints, and compared with the result.

    python container/base_versions.py record FILE     # before: NAME==VERSION lines, as pip takes constraints
    python container/base_versions.py compare FILE    # after: ends with 1 and names what has changed

torch, TransformerEngine, flash-attn and apex of an NGC image are built for each other and for its CUDA: another version
of one of them from PyPI installs without complaint and fails in a job.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HELD = (
    "torch",
    "torchvision",
    "torchao",
    "triton",
    "pytorch-triton",
    "transformer-engine",
    "flash-attn",
    "apex",
    "numpy",
)
"""Distributions that may not change; those that the base image lacks are free."""


def installed() -> dict[str, str]:
    """Return the versions of the held distributions that are installed, by canonical name."""
    versions = {}
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name in HELD:
            versions[name] = distribution.version
    return versions


def to_lines(versions: Mapping[str, str]) -> str:
    """Return versions by name as pip's constraints, a line each."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))


def changes(before: str, after: Mapping[str, str]) -> list[str]:
    """Return a sentence for each version that differs from the constraints that `to_lines` made before."""
    held = dict(line.split("==", 1) for line in before.splitlines() if line)
    return [
        f"{name} was {version} in the base image and is {after.get(name, 'gone')} now"
        for name, version in held.items()
        if after.get(name) != version
    ]


def main(arguments: Sequence[str]) -> int:
    """Run the command line."""
    if len(arguments) != 2 or arguments[0] not in ("record", "compare"):
        print(__doc__, file=sys.stderr)
        return 2
    file = Path(arguments[1])
    if arguments[0] == "record":
        file.write_text(to_lines(installed()), encoding="utf-8")
        print(file.read_text(encoding="utf-8"), end="")
        return 0
    differences = changes(file.read_text(encoding="utf-8"), installed())
    print("\n".join(differences), file=sys.stderr, end="\n" if differences else "")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
