"""Fixtures for tests of what a rehearsal puts in the place of the product's functions."""

from __future__ import annotations

import pytest

from megatron_r1v2.rehearsal import hollow_files, labels, other_ranks, stand_ins


@pytest.fixture
def undone(monkeypatch):
    """Put back what the test lets a rehearsal replace."""
    for module in (hollow_files, labels, other_ranks, stand_ins):
        monkeypatch.setattr(module, "replace", monkeypatch.setattr)
    return monkeypatch
