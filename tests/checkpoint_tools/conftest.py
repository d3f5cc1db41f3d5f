"""The folders that the tests of checkpoint/ start from."""

from __future__ import annotations

from tests.checkpoint.conftest import folders, made

__all__ = ["folders", "made"]
