"""`RECIPE.yaml section.key=value ...`: the command line of every entry point, with a help made from the schema."""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import textwrap
import typing
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

from megatron_r1v2.config.load import load_recipe, settings_of
from megatron_r1v2.config.schema import RunRecipe
from megatron_r1v2.config.validate import Stage, check_stage

_PACKAGE = __name__.partition(".")[0]


def parse_command_line(argv: Sequence[str], stage: Stage, *, description: str = "") -> RunRecipe:
    """Turn the arguments of an entry point into checked settings, or end the process with advice.

    Args:
        argv: the arguments without the program's name: a recipe, then `section.key=value` overrides. What evaluates
            does without a recipe: the settings are the defaults then.
        stage: what is about to run; decides which files must exist.
        description: shown by `--help` between the usage and the settings.

    Returns:
        The settings.

    Raises:
        SystemExit: 0 after `--help`; 2 after bad input, with one message on standard error.
    """
    if any(argument in ("-h", "--help") for argument in argv):
        print(_usage(stage), *([description.strip()] if description else []), describe_settings(), sep="\n\n")
        raise SystemExit(0)
    try:
        if not argv:
            raise ValueError(f"no recipe given\n{_usage(stage)}\n--help lists every setting")
        has_recipe = "=" not in argv[0]
        if argv[0].startswith("-") or not (has_recipe or stage == "evaluate"):
            raise ValueError(f"the first argument must be a recipe, got {argv[0]!r}\n{_usage(stage)}")
        recipe = load_recipe(argv[0], argv[1:]) if has_recipe else load_recipe(None, argv)
        check_stage(recipe, stage)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    return recipe


def command_parser(name: str, description: str, *, epilog: str = "") -> argparse.ArgumentParser:
    """Return the argument parser of a command that takes more than a recipe.

    Args:
        name: of the command.
        description: shown by `--help` as it stands.
        epilog: shown below the options.
    """
    return argparse.ArgumentParser(
        prog=f"python -m megatron_r1v2 {name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


@contextmanager
def tell_bad_input() -> Iterator[None]:
    """End the process with one message when the block finds bad input: a ValueError that our own code raised.

    One from a library is a defect and keeps its traceback.

    Raises:
        SystemExit: 2 after bad input, with the message on standard error.
    """
    try:
        yield
    except ValueError as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if trace is None or not trace.tb_frame.f_globals.get("__name__", "").startswith(f"{_PACKAGE}."):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def quiet_libraries() -> None:
    """Hide the warnings of libraries that a user can do nothing about (absent fused kernels, deprecations)."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for module in ("megatron", "torch"):
        warnings.filterwarnings("ignore", category=UserWarning, module=module)


def describe_settings() -> str:
    """Return every setting as text: section.key, what is accepted, the default, and the sentence below the field."""
    documentation = _field_documentation()
    lines: list[str] = []
    for section, kind in settings_of(RunRecipe).items():
        lines += [f"{section}: {_first_line(kind.__doc__)}", ""]
        defaults = kind()
        for key, expected in settings_of(kind).items():
            default = _show(getattr(defaults, key))
            lines.append(f"  {section}.{key}  <{_accepted(expected)}>  default: {default}")
            text = documentation.get((kind.__name__, key), "")
            lines += textwrap.wrap(text, width=110, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append("")
    return "\n".join(lines)


def _usage(stage: Stage) -> str:
    command = stage.replace("_", "-")
    return (
        f"usage: [torchrun ...] python -m megatron_r1v2 {command} RECIPE.yaml [section.key=value ...]\n"
        f"e.g.   python -m megatron_r1v2 {command} recipe.yaml train.steps=200 'train.parts=[adapter, vision]'"
    )


def _field_documentation() -> dict[tuple[str, str], str]:
    """Read the string literals below the fields, which Python itself throws away, from the source of the sections."""
    found: dict[tuple[str, str], str] = {}
    for section in settings_of(RunRecipe).values():
        node = ast.parse(inspect.getsource(section)).body[0]
        assert isinstance(node, ast.ClassDef)
        for field, below in zip(node.body, node.body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[node.name, field.target.id] = inspect.cleandoc(str(below.value.value))
    return found


def _accepted(expected: Any) -> str:
    origin = typing.get_origin(expected)
    if origin is list:
        return f"list of {_accepted(typing.get_args(expected)[0])}"
    if origin is dict:
        return "mapping"
    if issubclass(expected, Enum):
        return " | ".join(member.name for member in expected)
    return {bool: "true | false", int: "whole number", float: "number", str: "text"}[expected]


def _show(value: Any) -> str:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_show(item) for item in value) + "]"
    return repr(value) if isinstance(value, str) else str(value)


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0]
