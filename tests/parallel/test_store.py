"""A store whose owner is stopped does not answer: whoever asks is told after the time limit of the process groups."""

from __future__ import annotations

import datetime
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.parallel import groups
from megatron_r1v2.parallel.store import GroupStore
from tests.ranks import run_ranks

SECONDS = 3.0


def ask_one_that_is_stopped() -> tuple[list[bool], str, float]:
    """Rank 0, which has the store, stops itself when nobody waits for an answer; rank 1 asks, and lets it go on."""
    store = groups.initialize(ParallelConfig(), seed=1).store
    if dist.get_rank() == 0:
        store.set("pid", str(os.getpid()))
        there = [store.has([name]) for name in ("pid", "nothing")]
        store.get("ready")
        os.kill(os.getpid(), signal.SIGSTOP)
        return there, "", 0.0
    process = store.get("pid")
    store.set("ready", "yes")
    while Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    dist.distributed_c10d._get_default_store().set_timeout(datetime.timedelta(seconds=SECONDS))
    told, start = "", time.monotonic()
    try:
        store.has(["pid"])
    except RuntimeError as error:
        told = str(error)
    seconds = time.monotonic() - start
    os.kill(int(process), signal.SIGCONT)
    return [], told, seconds


def test_a_store_that_does_not_answer_is_told_after_the_time_limit() -> None:
    (there, _, _), (_, told, seconds) = run_ranks(2, ask_one_that_is_stopped)
    assert there == [True, False]
    assert f"has not answered for {SECONDS:.0f} s (parallel.timeout_minutes)" in told
    assert seconds == pytest.approx(SECONDS, abs=2)


class SlowStore(dist.HashStore):
    """A store in this process that answers when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.set_timeout(datetime.timedelta(seconds=60))
        self.may_answer = threading.Event()
        self.asked: list[str] = []

    def add(self, key: str, amount: int) -> int:
        """Wait like a store whose process is stopped."""
        self.may_answer.wait()
        self.asked.append(key)
        if key == "broken":
            raise RuntimeError("Connection reset by peer")
        return super().add(key, amount)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> SlowStore:
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    return SlowStore()


def test_what_nobody_waits_for_any_more_is_not_asked(store: SlowStore) -> None:
    asked = GroupStore(store)
    store.set_timeout(datetime.timedelta(seconds=0.3))
    for key in ("hangs", "behind it"):
        with pytest.raises(RuntimeError, match="has not answered for 0 s"):
            asked.add(key, 1)
    store.set_timeout(datetime.timedelta(seconds=60))
    store.may_answer.set()
    assert asked.add("after", 1) == 1
    assert store.asked == ["hangs", "after"]


def test_values_counters_and_keys(store: SlowStore) -> None:
    store.may_answer.set()
    asked = GroupStore(store)
    asked.set("a", "caf\u00e9")
    assert asked.get("a") == "caf\u00e9"
    assert (asked.add("count", 2), asked.add("count", 0)) == (2, 2)
    assert asked.has(["a", "count"])
    assert not asked.has(["a", "nothing"])


def test_one_thread_asks_however_many_wait(store: SlowStore) -> None:
    store.may_answer.set()
    asked, counts = GroupStore(store), []
    before = threading.active_count()
    waiting = [threading.Thread(target=lambda: counts.append(asked.add("count", 1))) for _ in range(16)]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join()
    assert sorted(counts) == list(range(1, 17))
    assert threading.active_count() == before + 1


def test_an_error_of_the_store_reaches_who_asked(store: SlowStore) -> None:
    store.may_answer.set()
    asked = GroupStore(store)
    with pytest.raises(RuntimeError, match="Connection reset by peer"):
        asked.add("broken", 1)
    assert asked.add("count", 1) == 1


def test_a_rank_alone_asks_without_a_thread() -> None:
    before = threading.active_count()
    context = groups.initialize(ParallelConfig(), seed=1)
    assert context.store.add("count", 3) == 3
    assert threading.active_count() == before
    groups.shut_down()
