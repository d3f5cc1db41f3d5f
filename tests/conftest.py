"""The order of the test files, and a heap that is quick to collect."""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path

import pytest

with suppress(ModuleNotFoundError):  # a machine that is lent runs tests/gpu alone, and may be without it
    from hypothesis import settings

    # An example may take as long as a busy machine needs. `--hypothesis-profile` comes later, and wins.
    settings.register_profile("any speed", deadline=None)
    settings.load_profile("any speed")

SLOWEST = (
    "stages/test_resume.py",
    "faults/test_signals.py",
    "faults/test_interrupt.py",
    "distributed/test_runs.py",
    "generation/test_shared_prompts.py",
    "benchmarks/test_gpu_carry.py",
    "distributed/test_mpo.py",
    "distributed/test_pretended_device.py",
    "distributed/test_parts.py",
    "checkpoint/test_published.py",
    "checkpoint/test_damaged_configs.py",
    "generation/test_layouts.py",
    "serve/test_run.py",
    "serve/test_evaluation.py",
    "faults/test_random_kills.py",
    "distributed/test_step.py",
    "models/test_llama.py",
    "planning/test_rehearsed.py",
    "rehearsal/test_rank.py",
)
"""Files that take over 20 seconds. At the end of a run one process would be at them while the others have nothing."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slowest files; all others keep their order behind them."""
    places = {Path(__file__).parent / file: place for place, file in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """Leave modules and tests out of garbage collection, as nothing of them is garbage.

    A collection looks at a million of these objects, for half a second; megatron-core asks for one in each save, and
    forked processes copy the memory that it looks at.
    """
    gc.collect()
    gc.freeze()
