"""A rank that takes long is waited for; one that does nothing is named."""

from __future__ import annotations

import io
import threading
import time
from contextlib import redirect_stderr

import torch.distributed as dist

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.parallel import groups
from megatron_r1v2.resilience import rank_watch
from megatron_r1v2.resilience.rank_watch import RankWatch
from tests.ranks import run_ranks


def watched(limit: float) -> tuple[str, str, str]:
    """Rank 1 works for twice the limit, and then stops working until rank 0 has noticed."""
    store = groups.initialize(ParallelConfig(), seed=1).store
    rank = dist.get_rank()
    told, printed = "", io.StringIO()
    with RankWatch(store, lambda: f"phase of {rank}", limit_seconds=limit) as watch:
        if rank == 1:
            for _ in range(20):
                time.sleep(limit / 10)
                watch.tick()
        watch.wait_for_all("first")
        if rank == 1:
            while not store.has(["noticed"]):
                time.sleep(0.05)
        else:
            try:
                # Printed when the block ends, not with the traceback: the launcher may end the process before that.
                with redirect_stderr(printed), RankWatch(store, lambda: "waiting", limit_seconds=limit) as inner:
                    inner.wait_for_all("second")
            except RuntimeError as error:
                told = str(error)
            store.set("noticed", "yes")
        report = watch.report()
    return told, printed.getvalue(), report


def test_a_rank_that_works_is_waited_for_and_one_that_does_nothing_is_named() -> None:
    (told, printed, report), _ = run_ranks(2, watched, 3.0)
    assert "rank 1 is lost: nothing was done there for parallel.timeout_minutes=0.05" in told
    assert "rank 1: phase of 1, since" in printed
    assert "rank 0: " in report


def count_questions(seconds: float) -> tuple[int, int]:
    """Rank 0 waits for rank 1; returns what that cost: questions to the store, and new threads."""
    store = groups.initialize(ParallelConfig(), seed=1).store
    store.set("first", "question")  # starts the one thread
    asked: list[str] = []
    has = store.has
    store.has = lambda keys: (asked.append(keys[0]), has(keys))[1]  # type: ignore[method-assign]
    with RankWatch(store, lambda: "generate", limit_seconds=60) as watch:
        threads = set(threading.enumerate())
        if dist.get_rank() == 1:
            time.sleep(seconds)
        watch.wait_for_all("generated")
        return len(asked), len(set(threading.enumerate()) - threads)


def test_waiting_costs_the_store_little_and_no_thread() -> None:
    (questions, threads), _ = run_ranks(2, count_questions, 3.0)
    assert threads == 0
    # 50 looks a second, and twice a second two questions more.
    assert 10 < questions < 3 * 60


def fail_together(late: float) -> list[bool]:
    """Rank 1 fails late, then not at all, then together with rank 0; its clock is an hour fast."""
    store = groups.initialize(ParallelConfig(), seed=1).store
    rank_watch._GATHER_SECONDS = 2.0  # type: ignore[attr-defined]
    watch, rank = RankWatch(store, lambda: "update", limit_seconds=60), dist.get_rank()
    clock = time.time
    time.time = lambda: clock() + 3600 * rank
    found = []
    for place, delay in (("late", late), ("alone", None), ("together", 0.0)):
        dist.barrier()
        if rank == 0 or delay is not None:
            time.sleep(rank * (delay or 0.0))
            found.append(watch.gather_failed(place))
    return found


def test_ranks_act_together_after_an_error_only_where_all_have_it_at_about_the_same_time() -> None:
    assert run_ranks(2, fail_together, 5.0) == [[False, False, True], [False, True]]


def test_a_report_that_does_not_come_holds_nothing_up(capsys, monkeypatch) -> None:
    store = groups.initialize(ParallelConfig(), seed=1).store
    monkeypatch.setattr(rank_watch, "_REPORT_SECONDS", 0.1)
    watch = RankWatch(store, lambda: "step 3, update", limit_seconds=60)
    monkeypatch.setattr(watch, "report", threading.Event().wait)
    watch.print_report()
    groups.shut_down()
    assert "does not answer; rank 0 itself: step 3, update" in capsys.readouterr().err


def report_twice() -> str:
    """Rank 0 meets a ValueError, and then an error that it tells of twice."""
    store = groups.initialize(ParallelConfig(), seed=1).store
    printed = io.StringIO()
    with redirect_stderr(printed):
        watch = RankWatch(store, lambda: "update", limit_seconds=60)
        for error in (ValueError("bad data, on every rank"), RuntimeError("a lost peer"), RuntimeError("and so on")):
            watch.report_error(error)
    return printed.getvalue()


def test_an_error_is_reported_once_and_bad_input_not_at_all() -> None:
    for printed in run_ranks(2, report_twice):
        assert printed.count("where the ranks were:") == 1
