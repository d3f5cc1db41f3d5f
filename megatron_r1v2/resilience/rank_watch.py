"""The phase of every rank: one that hangs or dies is named, one that only takes long is waited for.

A thread of each rank writes into the store of the process groups what its main thread is doing, and a count of what it
has done. A rank that waits for others reads it: one whose entry no longer changes is lost.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict

import torch.distributed as dist

from megatron_r1v2.parallel.store import GroupStore

_SECONDS_BETWEEN_BEATS = 1.0
_SECONDS_BETWEEN_LOOKS = 0.02
_REPORT_SECONDS = 5.0
"""A report may take so long: the store is out of reach where the first rank's node is lost."""
_GATHER_SECONDS = 20.0
"""Ranks that fail by the same cause do so within this time of each other."""


class _Beat(TypedDict):
    """The entry of a rank in the store."""

    phase: str
    ticks: int
    since: float
    """Seconds since phase or ticks changed."""
    time: float
    """When it was written, by the clock of that rank."""


class RankWatch:
    """The watch over the ranks of a run while its block runs; nothing for a rank alone.

    Args:
        current_phase: returns what this rank is doing, such as "step 12, generate".
        limit_seconds: without any change, after which a rank is lost.
    """

    def __init__(self, store: GroupStore, current_phase: Callable[[], str], *, limit_seconds: float) -> None:
        self._store = store
        self._current_phase = current_phase
        self._limit_seconds = limit_seconds
        self._ticks = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="rank-watch", daemon=True)
        self._warned = self._reported = False

    def __enter__(self) -> RankWatch:
        if dist.get_world_size() > 1:
            self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        # At once, not as a note of the error: the launcher may end this process before its traceback is printed. Bad
        # settings and data (ValueError) are told alike on every rank.
        if error is not None:
            self.report_error(error)
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * _SECONDS_BETWEEN_BEATS)

    def tick(self) -> None:
        """Count a finished piece of work, so that a long phase does not look lost."""
        self._ticks += 1

    def wait_for_all(self, place: str, *, leave: Callable[[bool], bool] = bool) -> None:
        """Collective over the world: wait for all ranks, as long as those that are missing still do something.

        A collective would end by its time-out while a replica is still generating long responses.

        Args:
            place: a name never used before.
            leave: called again and again with whether all are here; returns whether to go on, and may work meanwhile.

        Raises:
            RuntimeError: a missing rank has done nothing for the limit, or the store does not answer.
        """
        ranks = range(dist.get_world_size())
        arrived = [f"watch/{place}/{rank}" for rank in ranks]
        self._store.set(arrived[dist.get_rank()], "here")
        changes = _Changes()
        next_beat = 0.0
        while not leave(all_here := self._store.has(arrived)):
            # The others say something new once a beat: to read it more often would only load the store.
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + _SECONDS_BETWEEN_BEATS
                # Once all are here, only the first one can keep the others waiting: it sends the command to leave.
                missing = [0] if all_here else [rank for rank in ranks if not self._store.has([arrived[rank]])]
                self._refuse_lost(missing, changes)
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def gather_failed(self, place: str) -> bool:
        """Collective over the ranks that failed: return whether all have, so that they can still act together.

        A rank that failed alone cannot know that the others wait for it in a collective: so it waits here for a while
        only. The first rank decides, and the others wait for its word.

        Args:
            place: a name never used before.
        """
        ranks = dist.get_world_size()
        if ranks == 1:
            return True
        asked, word = f"failed/{place}/asked", f"failed/{place}"
        hands = [f"failed/{place}/{rank}" for rank in range(1, ranks)]
        try:
            # No rank reads another's clock, which may be set otherwise: one that has given up raises no hand.
            if dist.get_rank() == 0:
                self._store.set(asked, "all?")
                self._store.set(word, "all" if self._appear(hands, _GATHER_SECONDS) else "some")
            elif not self._appear([asked], 2 * _GATHER_SECONDS):
                return False
            else:
                self._store.set(hands[dist.get_rank() - 1], "here")
            # Longer than the first rank waits for hands.
            return self._appear([word], 2 * _GATHER_SECONDS) and self._store.get(word) == "all"
        except (RuntimeError, ValueError):
            return False  # the first rank, which has the store, is gone

    def _appear(self, keys: Sequence[str], seconds: float) -> bool:
        """Return whether keys are in the store within some time."""
        deadline = time.monotonic() + seconds
        while not (here := self._store.has(keys)) and time.monotonic() < deadline:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return here

    def report_error(self, error: BaseException) -> None:
        """Print the report at the first error that may be this rank's alone."""
        if isinstance(error, ValueError) or self._reported or dist.get_world_size() == 1:
            return
        self._reported = True
        self.print_report()

    def print_report(self) -> None:
        """Print the report, or that it takes too long: nothing may hold up a process that must end."""
        lines: list[str] = []
        reporter = threading.Thread(target=lambda: lines.append(self.report()), name="report", daemon=True)
        reporter.start()
        reporter.join(_REPORT_SECONDS)
        missing = f"where the ranks were: the first rank, which would know, does not answer; {self._own_phase()}"
        print(*(lines or [missing]), file=sys.stderr, flush=True)

    def report(self) -> str:
        """Return the last known phase of every rank, for people."""
        lines = []
        for rank in range(dist.get_world_size()):
            try:
                beat = self._last_beat(rank)
            except (RuntimeError, ValueError) as error:  # the first rank has the store
                reason = str(error).partition("\n")[0]
                return (
                    f"where the ranks were: the first rank, which would know, does not answer ({reason}); "
                    f"{self._own_phase()}"
                )
            if beat is None:
                lines.append(f"  rank {rank}: not heard of")
                continue
            ago = time.time() - beat["time"]
            lines.append(f"  rank {rank}: {beat['phase']}, since {beat['since']:.0f} s; heard of {ago:.0f} s ago")
        return "\n".join(["where the ranks were:", *lines])

    def _own_phase(self) -> str:
        return f"rank {dist.get_rank()} itself: {self._current_phase()}"

    def _refuse_lost(self, ranks: Iterable[int], changes: _Changes) -> None:
        for rank in ranks:
            beat = self._last_beat(rank)
            # Beats go on while a main thread hangs: what counts is what it does.
            work = (beat["phase"], beat["ticks"]) if beat is not None else None
            if changes.seconds_since(rank, work) > self._limit_seconds:
                raise RuntimeError(
                    f"rank {rank} is lost: nothing was done there for parallel.timeout_minutes="
                    f"{self._limit_seconds / 60:g}, while the others wait for it. Look at its node and its log, "
                    "and start again to go on from the newest checkpoint"
                )

    def _last_beat(self, rank: int) -> _Beat | None:
        key = f"watch/rank-{rank}"
        if not self._store.has([key]):
            return None
        beat: _Beat = json.loads(self._store.get(key))
        return beat

    def _beat(self) -> None:
        work, changes = (self._current_phase(), self._ticks), _Changes()
        while True:
            seconds = changes.seconds_since(dist.get_rank(), work)
            if not seconds:
                self._warned = False
            beat = _Beat(phase=work[0], ticks=work[1], since=seconds, time=time.time())
            try:
                self._store.set(f"watch/rank-{dist.get_rank()}", json.dumps(beat))
                self._warn_before_the_end(seconds)
            except (RuntimeError, ValueError):
                return  # the process groups have ended, or the first rank has, which the main thread sees by itself
            if self._ended.wait(_SECONDS_BETWEEN_BEATS):
                return
            work = (self._current_phase(), self._ticks)

    def _warn_before_the_end(self, seconds: float) -> None:
        """Print the report while there is time: NCCL's own watchdog ends the process without a word from Python."""
        if seconds > 0.9 * self._limit_seconds and not self._warned:
            self._warned = True
            message = f"rank {dist.get_rank()} has done nothing for {seconds:.0f} s; {self.report()}"
            print(message, file=sys.stderr, flush=True)


class _Changes:
    """The time of each rank's last change of work, as seen from here."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[tuple[str, int] | None, float]] = {}

    def seconds_since(self, rank: int, work: tuple[str, int] | None) -> float:
        """Return for how long a rank has been at this work; 0 where it is new."""
        if rank not in self._seen or self._seen[rank][0] != work:
            self._seen[rank] = (work, time.monotonic())
            return 0.0
        return time.monotonic() - self._seen[rank][1]
