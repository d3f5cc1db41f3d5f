"""The options, help texts and errors that all tools share."""

from __future__ import annotations

import argparse
import faulthandler
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_r1v2.checkpoint.conversion import RunOptions
from megatron_r1v2.checkpoint.destinations import DTYPES
from megatron_r1v2.checkpoint.hf.folders import DEFAULT_SHARD_BYTES
from megatron_r1v2.checkpoint.hf.mapping import LAYOUTS

INTERRUPTED = """An output is written beside its final place and renamed when it is complete and on disk. If a run is
interrupted, the same command goes on where it stopped; a damaged or unsuitable source leaves nothing behind."""
_SOURCES = """Leave the sources as they are until the command ends. A file that is truncated meanwhile ends it with an
error, or with "Bus error" and the line of code where it was mapped into memory; nothing that looks finished is left."""
_UNITS = {"": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3}


def tool_parser(name: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Return the parser of one tool."""
    return argparse.ArgumentParser(
        prog=f"python -m checkpoint_tools.{name}",
        description=description,
        epilog=f"{epilog}\n{_SOURCES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all conversions have."""
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="", help="of the result; default: as the source has it"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="files at a time, one tensor of each in memory; default: cores, up to 4",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_hf_arguments(parser: argparse.ArgumentParser, *, default: str | None) -> None:
    """Add the options of a Hugging Face folder as output."""
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default=default,
        help="transformers: loaded by transformers 4.57 and 5 and by vLLM, without remote code; chat: the keys of "
        "OpenGVLab's InternVL and Skywork's R1V, which their publishers' remote code reads, and neither transformers' "
        f"own classes nor vLLM 0.32 (default: {default or 'that of --base'})",
    )
    parser.add_argument(
        "--shard-size", type=byte_count, default=DEFAULT_SHARD_BYTES, help="of a safetensors file (default: 5GB)"
    )


def run_options(options: argparse.Namespace) -> RunOptions:
    """Return the run options of a command line."""
    if options.workers < 0:
        raise ValueError(f"--workers={options.workers} is negative; give 1 or more, or 0: by the cores")
    return RunOptions(workers=options.workers, overwrite=options.overwrite, quiet=options.quiet)


def byte_count(text: str) -> int:
    """Read a size such as 5GB.

    Raises:
        argparse.ArgumentTypeError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B?)", text.strip().upper())
    unit = match[2] if match else "?"
    unit = unit + "B" if unit in ("K", "M", "G") else unit.removesuffix("B") if unit == "B" else unit
    if match is None or unit not in _UNITS or float(match[1]) * _UNITS[unit] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for instance 5GB or 500MB")
    return int(float(match[1]) * _UNITS[unit])


@contextmanager
def explained_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turn errors that a user can mend into one line and exit code 1; print the line of code on a fatal signal."""
    if not faulthandler.is_enabled():
        faulthandler.enable()
    try:
        yield
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    except OSError as error:
        parser.exit(1, f"error: {error}; when it is mended, run the same command again to go on\n")
