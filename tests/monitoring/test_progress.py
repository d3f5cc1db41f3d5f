"""The progress bar of commands that have no steps."""

import io

import pytest
from rich.console import Console

from megatron_r1v2.monitoring import progress
from megatron_r1v2.monitoring.progress import progress_bar


@pytest.fixture
def screen(monkeypatch):
    """Stand for standard error, on a terminal."""
    output = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda stderr: Console(file=output, force_terminal=True, width=80, legacy_windows=False)
    )
    return output


def test_a_bar_shows_title_and_count(screen):
    with progress_bar("pairs", 8, shown=True) as show:
        show(5)
    assert "pairs" in screen.getvalue()
    assert "5/8" in screen.getvalue()


def test_other_ranks_show_nothing(screen):
    with progress_bar("pairs", 8, shown=False) as show:
        show(5)
    assert screen.getvalue() == ""


def test_a_log_gets_no_bar(capsys):
    with progress_bar("pairs", 8, shown=True) as show:
        show(5)
    assert capsys.readouterr().err == ""


class Clock:
    """Stand for `time`, by hand."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_gets_a_line_a_minute_with_the_time_to_go(capsys, clock):
    """The 1,000 responses of an interrupted evaluation took no time."""
    with progress_bar("evaluate", 4500, shown=True) as show:
        for seconds, done in ((0, 1000), (59, 1050), (60, 1100), (100, 1200), (121, 1250), (200, 1250)):
            clock.now = 1000.0 + seconds
            show(done)
    assert capsys.readouterr().err.splitlines() == [
        "evaluate: 1100 of 4500 after 0:01:00, about 0:34:00 to go",
        "evaluate: 1250 of 4500 after 0:02:01, about 0:26:13 to go",
        "evaluate: 1250 of 4500 after 0:03:20, about 0:43:20 to go",
    ]


def test_a_log_says_that_it_goes_on_before_the_first_response(capsys, clock):
    with progress_bar("evaluate", 4500, shown=True) as show:
        show(0)
        clock.now += 60
        show(0)
    assert capsys.readouterr().err == "evaluate: 0 of 4500 after 0:01:00\n"


def test_the_log_of_another_rank_gets_no_line(capsys, clock):
    with progress_bar("evaluate", 4500, shown=False) as show:
        clock.now += 600
        show(5)
    assert capsys.readouterr().err == ""
