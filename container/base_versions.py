"""The versions of a container's base image: recorded as pip's constraints, and compared with the result.

    python container/base_versions.py record FILE             # before: NAME==VERSION lines, as pip takes constraints
    python container/base_versions.py constrain FILE LOCK     # for pip: the base's versions, then those of the lock
    python container/base_versions.py compare FILE            # after: ends with 1 and names what has changed

torch, TransformerEngine, flash-attn and apex of an NGC image are built for each other and for its CUDA: another version
of one of them from PyPI installs without complaint and fails in a job.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
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

FREED = ("packaging",)
"""Distributions that the base constrains below what megatron-core asks for (packaging>=24.2), and which nothing of its
own is built against."""


def installed(names: Sequence[str] | None = HELD) -> dict[str, str]:
    """Return the versions of the distributions that are installed, by canonical name; None: of all."""
    found = {canonical(each.metadata["Name"] or ""): each.version for each in importlib.metadata.distributions()}
    return {name: version for name, version in found.items() if names is None or name in names}


def canonical(name: str) -> str:
    """Return the name of a distribution as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints(base: str, held: str, lock: str, present: Collection[str]) -> str:
    """Return the constraints of our installation.

    Args:
        base: the constraints that the base image brings.
        held: those that `to_lines` made of it.
        lock: NAME==VERSION lines of our own, for what the base does not have.
        present: canonical names of the distributions that the base has; they stay where our requirements let them.
    """
    lines = {name: line for name, line in _by_name(base).items() if name not in FREED} | _by_name(held)
    taken = lines.keys() | (set(present) - set(FREED))
    return "\n".join([*lines.values(), *(line for name, line in _by_name(lock).items() if name not in taken)]) + "\n"


def _by_name(text: str) -> dict[str, str]:
    """Return the lines of constraints by canonical name, without comments."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return {canonical(re.split(r"[^\w.-]", line, maxsplit=1)[0]): line for line in lines if line}


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
    if [*arguments[:1], len(arguments)] not in (["record", 2], ["compare", 2], ["constrain", 3]):
        print(__doc__, file=sys.stderr)
        return 2
    file = Path(arguments[1])
    if arguments[0] == "constrain":
        # The base names its own in pip's variable.
        base = "\n".join(
            Path(name).read_text(encoding="utf-8") for name in os.environ.get("PIP_CONSTRAINT", "").split()
        )
        held, lock = file.read_text(encoding="utf-8"), Path(arguments[2]).read_text(encoding="utf-8")
        print(constraints(base, held, lock, installed(None)), end="")
        return 0
    if arguments[0] == "record":
        file.write_text(to_lines(installed()), encoding="utf-8")
        print(file.read_text(encoding="utf-8"), end="")
        return 0
    differences = changes(file.read_text(encoding="utf-8"), installed())
    print("\n".join(differences), file=sys.stderr, end="\n" if differences else "")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
