"""`RECIPE.yaml section.key=value ...`: the command line of the stages, with a help made from their settings."""

from __future__ import annotations

import argparse
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from megatron_r1v2.config.recipes import Recipe

_PACKAGE = __name__.partition(".")[0]
_HELP = ("-h", "--help")
AnyRecipe = TypeVar("AnyRecipe", bound="Recipe")


def parse_command_line(argv: Sequence[str], kind: type[AnyRecipe]) -> AnyRecipe:
    """Turn the arguments of a stage into checked settings, or end the process with advice.

    Args:
        argv: a recipe, then `section.key=value` overrides. A command that takes the recipe of any stage does without
            one: the settings are the defaults then.
        kind: of the recipe; decides what is read, and which files must exist.

    Raises:
        SystemExit: 0 after `--help`; 2 after bad input, with one message on standard error.
    """
    asked = next((position for position, argument in enumerate(argv) if argument in _HELP), None)
    if asked is not None:
        print(stage_help(kind, next(iter(argv[asked + 1 :]), "")))
        raise SystemExit(0)
    from megatron_r1v2.config.load import load_recipe_as
    from megatron_r1v2.config.validate import check_start

    try:
        if not argv:
            raise ValueError(f"no recipe given\n{_usage(kind)}\n--help lists the settings")
        has_recipe = "=" not in argv[0]
        if argv[0].startswith("-") or not (has_recipe or kind.stage is None):
            raise ValueError(f"the first argument must be a recipe, got {argv[0]!r}\n{_usage(kind)}")
        recipe = load_recipe_as(kind, argv[0], argv[1:]) if has_recipe else load_recipe_as(kind, None, argv)
        check_start(recipe)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    return recipe


def command_parser(name: str, description: str, *, epilog: str = "") -> argparse.ArgumentParser:
    """Return the argument parser of a command that takes more than a recipe.

    Args:
        description: shown by `--help` as it stands.
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


def stage_help(kind: type[Recipe], word: str = "") -> str:
    """Return what a stage does and the settings that it reads.

    Args:
        word: show only the settings that have it in their name or meaning; "": all, and what the stage does.
    """
    settings = describe_settings(kind, word)
    if word:
        return settings or f"no setting of {kind.title()} has {word!r} in its name or its meaning"
    return "\n\n".join(
        [_usage(kind), kind.purpose(), "settings; --help WORD shows those that contain the word", settings]
    )


def describe_settings(kind: type[Recipe], word: str = "") -> str:
    """Return settings as text: section.key, what is accepted, the default, and the meaning.

    Args:
        word: only the settings that have it in their name or meaning; "": all.
    """
    from megatron_r1v2.config.load import own_defaults
    from megatron_r1v2.config.wording import range_text, type_name

    lines: list[str] = []
    for name, section in kind.sections().items():
        told: list[str] = []
        defaults = own_defaults(kind, name)
        for key, field in section.model_fields.items():
            meaning = " ".join((field.description or "").split())
            if word.lower() not in f"{name}.{key} {meaning}".lower():
                continue
            accepted = ", ".join(filter(None, (type_name(field.annotation), range_text(field))))
            default = defaults.get(key, field.get_default(call_default_factory=True))
            told.append(f"  {name}.{key}  <{accepted}>  default: {_show(default)}")
            told += textwrap.wrap(meaning, width=110, initial_indent=" " * 6, subsequent_indent=" " * 6)
        if told:
            title = (section.__doc__ or "").strip().splitlines()[0]
            lines += [f"{name}: {title}", "", *told, ""]
    return "\n".join(lines)


def _usage(kind: type[Recipe]) -> str:
    command, recipe = kind.title().replace("_", "-"), "RECIPE.yaml" if kind.stage else "[RECIPE.yaml]"
    example = "train.steps=200 'train.parts=[adapter, vision]'" if kind.stage else "evaluation.runs=3"
    return (
        f"usage: [torchrun ...] python -m megatron_r1v2 {command} {recipe} [section.key=value ...]\n"
        f"e.g.   python -m megatron_r1v2 {command} recipe.yaml {example}"
    )


def _show(value: object) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_show(item) for item in value) + "]"
    if value is None:
        return "none"
    return repr(value) if isinstance(value, str) else str(value)
