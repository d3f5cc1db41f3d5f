"""Tails are simulated once for all plans of the same engine and lengths: 73 replicas take two seconds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest

from megatron_r1v2.planning import plan


@pytest.fixture(autouse=True, scope="session")
def _tails_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "simulate_tails", cache(plan.simulate_tails))
        yield
