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
