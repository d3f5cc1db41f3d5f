"""The options and the help that all tools share."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from checkpoint_tools import inspect, parts, verify
from megatron_r1v2.checkpoint.command_line import (
    add_run_arguments,
    byte_count,
    explained_errors,
    run_options,
    tool_parser,
)
from megatron_r1v2.checkpoint.conversion import RunOptions


@pytest.mark.parametrize("tool", [verify, inspect, parts])
def test_help_has_an_example(tool, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert f"python -m checkpoint_tools.{tool.__name__.split('.')[-1]}" in told
    assert "Bus error" in told


@pytest.mark.parametrize(
    ("text", "count"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("20K", 20_000), ("7", 7), ("9B", 9)]
)
def test_sizes_are_read(text, count):
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "5XB", "5 TB", "1e9"])
def test_texts_that_are_no_size_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no size; write for instance"):
        byte_count(text)


def test_options_become_run_options_and_negative_workers_are_refused():
    parser = tool_parser("verify", "Text.", "example")
    add_run_arguments(parser)
    parsed = parser.parse_args(["--output", "out", "--workers", "3", "--overwrite"])
    assert run_options(parsed) == RunOptions(workers=3, overwrite=True, quiet=False)
    assert (parsed.dtype, parsed.output) == ("", Path("out"))
    with pytest.raises(ValueError, match="--workers=-1 is negative"):
        run_options(parser.parse_args(["--output", "out", "--workers", "-1"]))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("a is wrong"), "error: a is wrong\n"),
        (OSError(28, "No space left"), "error: [Errno 28] No space left; when it is mended, run the same command"),
    ],
)
def test_errors_become_a_line_and_a_code(capsys, error, told):
    parser = tool_parser("verify", "Text.", "example")
    with pytest.raises(SystemExit) as stopped, explained_errors(parser):
        raise error
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith(told)
    with pytest.raises(KeyError), explained_errors(parser):
        raise KeyError("ours")
