"""A store whose owner is stopped does not answer: whoever asks is told after the time limit of the process groups."""

from __future__ import annotations

import datetime
import os
import signal
import time

import pytest
import torch.distributed as dist

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.parallel import groups
from megatron_r1v2.parallel.store import ask, default_store
from tests.ranks import run_ranks

SECONDS = 3.0


def ask_one_that_is_stopped() -> tuple[list[bool], str, float]:
    """Rank 1 stops rank 0, which has the store, and lets it go on in the end."""
    groups.initialize(ParallelConfig(), seed=1)
    default_store().set_timeout(datetime.timedelta(seconds=SECONDS))
    told, seconds = "", 0.0
    process = ask(lambda store: (store.set(f"pid-{dist.get_rank()}", str(os.getpid())), store.get("pid-0"))[1])
    there = ask(lambda store: [store.check([name]) for name in ("pid-0", "nothing")])
    if dist.get_rank() == 1:
        os.kill(int(process), signal.SIGSTOP)
        start = time.monotonic()
        try:
            ask(lambda store: store.check(["pid-0"]))
        except RuntimeError as error:
            told, seconds = str(error), time.monotonic() - start
        os.kill(int(process), signal.SIGCONT)
    return there, told, seconds


def test_a_store_that_does_not_answer_is_told_after_the_time_limit() -> None:
    (there, _, _), (_, told, seconds) = run_ranks(2, ask_one_that_is_stopped)
    assert there == [True, False]
    assert f"has not answered for {SECONDS:.0f} s (parallel.timeout_minutes)" in told
    assert seconds == pytest.approx(SECONDS, abs=2)
