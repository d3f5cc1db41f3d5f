"""The progress of the commands that have no steps: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_SECONDS = 60.0
"""Between two lines in a log."""


@contextmanager
def progress_bar(title: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show the progress of a command as a bar on a terminal, and in a log as a line a minute.

    Args:
        shown: True on one rank only.

    Yields:
        To be called with how much is done.
    """
    console = Console(stderr=True)  # standard output may be what the command is run for
    if shown and not console.is_terminal:
        yield _LogLines(title, total).show
        return
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not shown) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)


class _LogLines:
    def __init__(self, title: str, total: int) -> None:
        self._title = title
        self._total = total
        self._began = self._printed = time.monotonic()
        self._before: int | None = None
        """Done when it was first asked: what an interrupted command had done says nothing of the speed."""

    def show(self, done: int) -> None:
        now = time.monotonic()
        if self._before is None:
            self._before = done
        if now - self._printed < LOG_SECONDS:
            return
        self._printed = now
        line = f"{self._title}: {done} of {self._total} after {clock(now - self._began)}"
        if fresh := done - self._before:
            line += f", about {clock((now - self._began) * (self._total - done) / fresh)} to go"
        print(line, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds: 0:03:10."""
    return str(timedelta(seconds=round(seconds)))
