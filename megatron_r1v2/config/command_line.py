"""`RECIPE.yaml section.key=value ...`: the command line of the stages, with a help made from their settings."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from megatron_r1v2.config.load import Check
    from megatron_r1v2.config.recipes import Recipe

HELP = ("-h", "--help")
_PACKAGE = __name__.partition(".")[0]
AnyRecipe = TypeVar("AnyRecipe", bound="Recipe")


def parse_command_line(argv: Sequence[str], kind: type[AnyRecipe], check: Check | None = None) -> AnyRecipe:
    """Turn the arguments of a stage into checked settings, or end the process with advice.

    Args:
        argv: a recipe, then `section.key=value` overrides. A command that takes the recipe of any stage does without
            one: the settings are the defaults then.
        kind: of the recipe; decides what is read, and which files must exist.
        check: finds what else keeps the command from starting; told with the mistakes of the recipe.

    Raises:
        SystemExit: 0 after `--help`; 2 after bad input, with one message on standard error.
    """
    asked = next((position for position, argument in enumerate(argv) if argument in HELP), None)
    if asked is not None:
        print(stage_help(kind, argv[asked + 1 :]))
        raise SystemExit(0)
    # Here: pydantic takes longer to import than a command without a recipe takes to start.
    from megatron_r1v2.config.load import load_recipe_as

    try:
        if not argv:
            raise ValueError(f"no recipe given\n{_usage(kind)}\n--help lists the settings")
        has_recipe = "=" not in argv[0]
        if argv[0].startswith("-") or not (has_recipe or kind.stage is None):
            raise ValueError(f"the first argument must be a recipe, got {argv[0]!r}\n{_usage(kind)}")
        path, overrides = (argv[0], argv[1:]) if has_recipe else (None, argv)
        return load_recipe_as(kind, path, overrides, check=check)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def command_parser(
    name: str, description: str, *, epilog: str = "", settings: Callable[[], str] = str
) -> argparse.ArgumentParser:
    """Return the argument parser of a command that takes more than a recipe.

    Args:
        description: shown by `--help` as it stands.
        settings: returns the settings that `--help WORD` searches too.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m megatron_r1v2 {name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    text = "show this; with words, what contains any of them" + ("" if settings is str else ", settings too")
    parser.add_argument(*HELP, action=_Help, settings=settings, help=text)
    return parser


class _Help(argparse.Action):
    """Shows the help of a parser, or the options and settings that contain any of some words."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, settings: Callable[[], str], help: str) -> None:
        super().__init__(option_strings, dest, nargs="*", default=argparse.SUPPRESS, metavar="WORD", help=help)
        self.settings = settings

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,  # noqa: ARG002
        values: str | Sequence[object] | None,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        if not values:
            parser.print_help()
        else:
            parser.usage, parser.description, parser.epilog = argparse.SUPPRESS, None, None
            words = [str(word) for word in values]
            print(select_entries(f"{parser.format_help()}\n{self.settings()}", words, of=parser.prog.split()[-1]))
        parser.exit()


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
        # The innermost frame is the one that raised it.
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


def stage_help(kind: type[Recipe], words: Sequence[str] = ()) -> str:
    """Return what a stage does and the settings that it reads; or those settings that contain any of some words."""
    settings = describe_settings(kind)
    if words:
        return select_entries(settings, words, of=kind.title())
    title = "settings; --help WORD ... shows those that contain any of the words"
    return "\n\n".join([_usage(kind), kind.purpose(), title, settings])


def select_entries(text: str, words: Sequence[str], *, of: str) -> str:
    """Return the entries of a help text that contain any of some words, below their headings.

    Args:
        text: headings, and entries that start two columns in; their further lines start further in.
        of: which command, for where there is none.
    """
    kept: list[str] = []
    heading = ""
    for part in re.split(r"\n+(?=(?:  )?\S)", text):
        if not part.startswith("  "):
            heading = part
        # Lines are joined: a phrase may be cut by a line end.
        elif any(word.lower() in " ".join(part.lower().split()) for word in words):
            kept += [f"\n{heading}\n", part] if heading else [part]
            heading = ""
    asked = " or ".join(map(repr, words))
    return "\n".join(kept).strip("\n") or f"no setting of {of} has {asked} in its name or its meaning"


def describe_settings(kind: type[Recipe] | None = None) -> str:
    """Return settings as text: section.key, what is accepted, the default, and the meaning.

    Args:
        kind: whose settings; None: all there are, each with its stages.
    """
    from megatron_r1v2.config.load import own_defaults
    from megatron_r1v2.config.recipes import every_section, stages_that_read
    from megatron_r1v2.config.wording import range_text, type_name

    lines: list[str] = []
    for name, section in (kind.sections() if kind else every_section()).items():
        lines += [f"{name}: {(section.__doc__ or '').strip().splitlines()[0]}", ""]
        defaults = own_defaults(kind, name) if kind else {}
        for key in kind.settings()[name] if kind else section.model_fields:
            field = section.model_fields[key]
            accepted = ", ".join(filter(None, (type_name(field.annotation), range_text(field))))
            default = show_value(defaults.get(key, field.get_default(call_default_factory=True)))
            stages = "" if kind else f"  in: {', '.join(stages_that_read(name, key))}"
            lines.append(f"  {name}.{key}  <{accepted}>  default: {default}{stages}")
            meaning = " ".join((field.description or "").split())
            lines += textwrap.wrap(meaning, width=110, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append("")
    return "\n".join(lines)


def _usage(kind: type[Recipe]) -> str:
    command, recipe = kind.title().replace("_", "-"), "RECIPE.yaml" if kind.stage else "[RECIPE.yaml]"
    example = "train.steps=200 'train.parts=[adapter, vision]'" if kind.stage else "evaluation.runs=3"
    return (
        f"usage: [torchrun ...] python -m megatron_r1v2 {command} {recipe} [section.key=value ...]\n"
        f"e.g.   python -m megatron_r1v2 {command} recipe.yaml {example}"
    )


def show_value(value: object) -> str:
    """Return the value of a setting as YAML has it."""
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(show_value(item) for item in value) + "]"
    if value is None:
        return "none"
    return repr(value) if isinstance(value, str) else str(value)
