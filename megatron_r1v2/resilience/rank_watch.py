"""Where every rank is, so that one that hangs or dies is named, and one that only takes long is waited for.

A thread of each rank writes down in the store of the process groups what its main thread is doing, and a count of what
it has done. Whoever waits for others reads it: a rank whose entry no longer changes is lost.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch.distributed as dist

from megatron_r1v2.parallel.store import ask, default_store

_SECONDS_BETWEEN_BEATS = 1.0
_SECONDS_BETWEEN_LOOKS = 0.02


class RankWatch:
    """Watches the ranks of a run while its block runs; does nothing where there is one."""

    def __init__(self, where: Callable[[], str], *, limit_seconds: float) -> None:
        """Prepare.

        Args:
            where: says what this rank is doing, such as "step 12, generate".
            limit_seconds: without any change, after which a rank is lost.
        """
        self._where = where
        self._limit_seconds = limit_seconds
        self._ticks = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="rank-watch", daemon=True)
        self._warned = False

    def __enter__(self) -> RankWatch:
        if dist.get_world_size() > 1:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and dist.get_world_size() > 1:
            error.add_note(self.report())
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * _SECONDS_BETWEEN_BEATS)

    def tick(self) -> None:
        """Say that something was done, however long the whole takes."""
        self._ticks += 1

    def wait_for_all(self, name: str, *, leave: Callable[[bool], bool] = bool) -> None:
        """Wait until all ranks have come here, for as long as those that have not go on doing something.

        A collective would end by its time-out while a replica is still generating long responses.

        Args:
            name: of the place, never used before.
            leave: asked again and again, told whether all are here; says whether to go on, and may do something
                meanwhile.

        Raises:
            RuntimeError: a rank has not come, and has done nothing for the limit; or the store does not answer.
        """
        ask(lambda store: store.set(f"watch/{name}/{dist.get_rank()}", "here"))
        missing = {rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()}
        heard: dict[int, tuple[Any, float]] = {}
        while True:
            missing = {rank for rank in missing if not _has(f"watch/{name}/{rank}")}
            if leave(not missing):
                return
            for rank in missing or {0}:  # where all are here, the first one says when to leave
                entry = self._entry(rank)
                # Beats go on while a main thread hangs: what counts is what it does.
                done = (entry.get("where"), entry.get("ticks"))
                if rank not in heard or heard[rank][0] != done:
                    heard[rank] = (done, time.monotonic())
                elif time.monotonic() - heard[rank][1] > self._limit_seconds:
                    raise RuntimeError(
                        f"rank {rank} is lost: nothing was done there for parallel.timeout_minutes="
                        f"{self._limit_seconds / 60:g}, while the others wait for it. Look at its node and its log, "
                        "and start again to go on from the newest checkpoint"
                    )
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def report(self) -> str:
        """Return what every rank was doing when it was last heard of."""
        lines = []
        for rank in range(dist.get_world_size()):
            try:
                entry = self._entry(rank)
            except (RuntimeError, ValueError) as error:  # the first rank has the store
                told = str(error).partition("\n")[0]
                return (
                    f"where the ranks were: the first rank, which would know, does not answer ({told}); rank "
                    f"{dist.get_rank()} itself: {self._where()}"
                )
            if not entry:
                lines.append(f"  rank {rank}: not heard of")
                continue
            ago = time.time() - entry["time"]
            lines.append(f"  rank {rank}: {entry['where']}, since {entry['since']:.0f} s; heard of {ago:.0f} s ago")
        return "\n".join(["where the ranks were:", *lines])

    def _entry(self, rank: int) -> dict[str, Any]:
        key = f"watch/rank-{rank}"
        return json.loads(ask(lambda store: store.get(key))) if _has(key) else {}

    def _beat(self) -> None:
        last, since = None, time.monotonic()
        while True:
            done = (self._where(), self._ticks)
            if done != last:
                last, since, self._warned = done, time.monotonic(), False
            seconds = time.monotonic() - since
            entry = {"where": done[0], "ticks": done[1], "since": seconds, "time": time.time()}
            try:
                default_store().set(f"watch/rank-{dist.get_rank()}", json.dumps(entry))
                self._warn_before_the_end(seconds)
            except (RuntimeError, ValueError):
                return  # the process groups have ended, or the first rank has, and the main thread is told by its own
            if self._ended.wait(_SECONDS_BETWEEN_BEATS):
                return

    def _warn_before_the_end(self, seconds: float) -> None:
        """Say where all are before NCCL's own watchdog ends the process without a word from Python."""
        if seconds > 0.9 * self._limit_seconds and not self._warned:
            self._warned = True
            told = f"rank {dist.get_rank()} has done nothing for {seconds:.0f} s; {self.report()}"
            print(told, file=sys.stderr, flush=True)


def _has(key: str) -> bool:
    return ask(lambda store: store.check([key]))
