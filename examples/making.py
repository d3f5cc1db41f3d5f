"""Command lines of the makers of parts and data: options, sets of rows, an output that is left alone if it exists."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from megatron_r1v2.resilience.files import atomic_folder
from megatron_r1v2.resilience.json_lines import append_json_lines

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Settings = TypeVar("Settings", bound=DataclassInstance)

SEED = 1234


def maker_parser(module: str, description: str | None, *, output: str) -> ArgumentParser:
    """Return the parser of a maker, which has --output.

    Args:
        module: the maker.
        description: its docstring.
        output: the help of --output.
    """
    parser = ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help=output)
    return parser


def add_settings(parser: ArgumentParser, defaults: DataclassInstance, helps: Mapping[str, str]) -> None:
    """Add an option for each field of `defaults` that has a help."""
    for name, text in helps.items():
        value = getattr(defaults, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"{text} (%(default)s)"
        )


def chosen_settings(options: Namespace, defaults: Settings) -> Settings:
    """Return `defaults` with the fields that `add_settings` made options of."""
    given = {field.name: getattr(options, field.name) for field in fields(defaults) if hasattr(options, field.name)}
    return replace(defaults, **given)


def report_if_made(what: str, output: Path) -> bool:
    """Return whether the output exists, and print so: a maker leaves it alone."""
    if output.exists():
        print(f"{what}: {output} is there already; remove it to make it again")
    return output.exists()


def add_sets(parser: ArgumentParser, counts: Mapping[str, int]) -> None:
    """Add an option for the number of questions of each set."""
    for name, count in counts.items():
        parser.add_argument(f"--{name}", type=int, default=count, help=f"questions in {name}.jsonl (%(default)s)")


def write_sets(
    output: Path, counts: Mapping[str, int], make_rows: Callable[[str, int, Path], Iterable[Mapping[str, object]]]
) -> None:
    """Write NAME.jsonl for each set, and their images; the folder appears when all of it is complete.

    Args:
        output: the folder to make.
        counts: the number of questions by name of the set.
        make_rows: makes the rows of a set from its name, its count and the folder for its images.
    """
    with atomic_folder(output, replace=True) as folder:
        images = folder / "images"
        images.mkdir()
        for name, count in counts.items():
            append_json_lines(folder / f"{name}.jsonl", make_rows(name, count, images))


def print_sets(output: Path, counts: Mapping[str, int]) -> None:
    """Print the number of questions of each set."""
    print(f"data: {output}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
