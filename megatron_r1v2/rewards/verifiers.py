"""Checks of hostile text in worker processes with a time limit: a hang or crash fails one check, never the run.

Not built on pebble's ProcessPool, whose workers import torch with the trainer's main module, get their signal to stop
3 s before the one that they cannot ignore, and outlive a killed trainer when stuck in C (tried with pebble 5.2).
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from megatron_r1v2.rewards.answer import ANSWER_TYPES, NUMERIC_TOLERANCE, type_of_alternative
from megatron_r1v2.rewards.verifier_worker import LENGTH, STARTED, read_exactly

if TYPE_CHECKING:
    from megatron_r1v2.types import AnswerType

ResultT = TypeVar("ResultT", covariant=True)
FailureT = TypeVar("FailureT")

# For a worker to start and to import the modules of a check, on a loaded machine or a slow file system.
START_SECONDS = 120.0
_MAX_FAILED_STARTS = 3
# A worker that failed to start exits by itself; its exit code and message say why.
_EXIT_SECONDS = 1.0

TIMEOUT_SECONDS = 5.0
"""A check that takes longer scores 0 and is counted."""
MOST_WORKERS = 8


@dataclass(frozen=True)
class Call(Generic[ResultT]):
    """One function to run in a worker, and the type of its result once that went through JSON.

    Example: module "megatron_r1v2.rewards.claims", function "find_claims", arguments ("left 3", pattern).
    """

    module: str
    """Imported by the worker, so it should import little."""
    function: str
    arguments: tuple[object, ...]
    """Passed as JSON, as the result is: tuples arrive as lists."""
    imports: tuple[str, ...] = ()
    """Further modules, or Python files by their path, to import before the time limit of the call begins."""


def answer_call(
    text: str, answer: str, answer_type: AnswerType, numeric_tolerance: float = NUMERIC_TOLERANCE
) -> Call[bool]:
    """Return the call that checks whether a response's last boxed answer is right.

    Args:
        numeric_tolerance: accepted difference, relative to the reference.

    Raises:
        ValueError: an unknown answer type.
    """
    if answer_type not in ANSWER_TYPES:
        raise ValueError(f"answer_type {answer_type!r} is unknown; use one of {', '.join(ANSWER_TYPES)}")
    imports = ("megatron_r1v2.rewards.math_answer",) if answer_type == "math" else ()
    arguments = (text, answer, answer_type, numeric_tolerance)
    return Call("megatron_r1v2.rewards.answer", "answer_is_correct", arguments, imports)


def answer_calls(
    text: str, answer: str, answer_type: AnswerType, *, alternatives: Sequence[str], tolerances: Sequence[float]
) -> list[Call[bool]]:
    """Return the calls of which one finds a right response right: by the answer, an alternative, or the tolerances."""
    others = [answer_call(text, other, type_of_alternative(other, answer_type)) for other in alternatives]
    near = [within_call(text, answer, tolerances)] if tolerances else []
    return [answer_call(text, answer, answer_type), *others, *near]


def within_call(text: str, answer: str, tolerances: Sequence[float]) -> Call[bool]:
    """Return the call that checks whether the numbers in a response's last box are near enough.

    Args:
        tolerances: absolute; one for all parts of the reference, or one for each.
    """
    module = "megatron_r1v2.rewards.math_answer"
    return Call(module, "answer_is_within", (text, answer, tolerances), imports=(module,))


def claims_call(text: str, pattern: str) -> Call[list[list[str]]]:
    """Return the call that finds the claims of a response, as [name, value], by a pattern that was checked."""
    return Call("megatron_r1v2.rewards.claims", "find_claims", (text, pattern))


def steps_call(text: str, *, wanted: int, conclusion: int) -> Call[float]:
    """Return the call of `steps_score`."""
    return Call("megatron_r1v2.rewards.reasoning", "steps_score", (text, wanted, conclusion))


def repetition_call(token_ids: Sequence[int], *, tokens: int) -> Call[float]:
    """Return the call of `repetition_score`."""
    return Call("megatron_r1v2.rewards.reasoning", "repetition_score", (token_ids, tokens))


def worker_count() -> int:
    """Return how many checks a rank can run beside its own work: half of its share of the cores, at most 8."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // (2 * ranks)))


class VerifierPool:
    """Worker processes that check answers, replaced when a check hangs or kills one.

    A worker is a fresh interpreter that imports neither torch nor megatron-core (about 50 ms), started without
    forking this process, so a pool may be made in a process with threads and CUDA. Use it as a context manager, from
    one thread at a time. Workers end with the pool, or with its process however that ends.

    Args:
        timeout_seconds: wall-clock limit of one check.

    Raises:
        ValueError: no worker, or no time.
    """

    timeouts: int
    """Checks that ran past the limit, since the pool was made."""
    crashes: int
    """Checks that ended their worker, and those of `count_crashes`."""

    def __init__(self, workers: int, timeout_seconds: float) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers} check nothing; give 1 or more")
        if not 0 < timeout_seconds < float("inf"):
            raise ValueError(f"timeout_seconds={timeout_seconds} must be a number above 0")
        self.timeouts = 0
        self.crashes = 0
        self._timeout_seconds = timeout_seconds
        self._failed_starts = 0
        self._pinned: dict[str, str] = {}
        self._workers = [_Worker(timeout_seconds) for _ in range(workers)]

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers and wait for them; the pool cannot be used afterwards."""
        for worker in self._workers:
            worker.end()
        self._workers = []

    def count_crashes(self, count: int) -> None:
        """Count checks that failed without ending their worker."""
        self.crashes += count

    def pin(self, path: str, digest: str) -> None:
        """Check that a file has not changed since it was pinned first: the next new worker would import another one.

        Raises:
            RuntimeError: it has changed.
        """
        if self._pinned.setdefault(path, digest) != digest:
            raise RuntimeError(
                f"{path} has changed since the run began, and would score responses in another way; put it back, or "
                "start the run again, which goes on from its newest checkpoint with the file as it is then"
            )

    def run(self, calls: Sequence[Call[ResultT]], *, failed: FailureT) -> list[ResultT | FailureT]:
        """Run functions in the workers, and return the results in the order of the calls.

        Args:
            failed: the result of a call that hangs or crashes.

        Raises:
            RuntimeError: workers end before they start a check (the reason is on stderr), or the pool is closed.
        """
        if not self._workers:
            raise RuntimeError("this VerifierPool is closed; make a new one")
        results: list[ResultT | FailureT] = [failed] * len(calls)
        waiting = deque(range(len(calls)))
        try:
            while waiting or any(worker.call_index is not None for worker in self._workers):
                for slot in range(len(self._workers)):
                    if waiting and self._workers[slot].call_index is None:
                        self._send(slot, waiting, calls)
                self._wait(results, waiting)
        finally:
            # After an exception (Ctrl-C among others) a result may be on its way that the next run would take for its
            # own; so busy workers go.
            for slot, worker in enumerate(self._workers):
                if worker.call_index is not None:
                    self._replace(slot)
        return results

    def _send(self, slot: int, waiting: deque[int], calls: Sequence[Call[ResultT]]) -> None:
        index = waiting.popleft()
        if not self._workers[slot].send(index, calls[index]):
            self._retry_start(slot, waiting, index)

    def _wait(self, results: list[ResultT | FailureT], waiting: deque[int]) -> None:
        """Wait for the next message or deadline, and act on every worker that has one."""
        busy = [slot for slot, worker in enumerate(self._workers) if worker.call_index is not None]
        if not busy:
            return
        deadline = min(self._workers[slot].deadline for slot in busy)
        with selectors.DefaultSelector() as selector:
            for slot in busy:
                selector.register(self._workers[slot].connection, selectors.EVENT_READ, slot)
            ready = {key.data for key, _ in selector.select(max(0.0, deadline - time.monotonic()))}
        now = time.monotonic()
        for slot in busy:
            # A result that has arrived counts, even when this process was too busy to look before the deadline.
            if slot in ready:
                self._read(slot, results, waiting)
            elif now >= self._workers[slot].deadline:
                self._handle_failure(slot, waiting, timed_out=True)

    def _read(self, slot: int, results: list[ResultT | FailureT], waiting: deque[int]) -> None:
        worker = self._workers[slot]
        if not worker.started:
            if not worker.read_started():
                self._handle_failure(slot, waiting, timed_out=False)
            return
        result = worker.read_result()
        if result is None:
            self._handle_failure(slot, waiting, timed_out=False)
            return
        index, worker.call_index = worker.call_index, None
        assert index is not None, "a worker that was asked nothing sent a result"
        results[index] = json.loads(result)
        self._failed_starts = 0

    def _handle_failure(self, slot: int, waiting: deque[int], *, timed_out: bool) -> None:
        """Count the time-out or crash of a worker's call, whose result stays `failed`, and replace the worker."""
        worker = self._workers[slot]
        assert worker.call_index is not None, "only a worker with a call can fail one"
        if not worker.started:
            self._retry_start(slot, waiting, worker.call_index)
            return
        # When this process is slow, the worker's own alarm may come before the deadline is noticed here.
        if worker.end() == -signal.SIGALRM or timed_out:
            self.timeouts += 1
        else:
            self.crashes += 1
        self._failed_starts = 0
        self._replace(slot)

    def _retry_start(self, slot: int, waiting: deque[int], index: int) -> None:
        """Put a call that never ran back into the queue, with a new worker, or give up after several such starts."""
        # An error rather than `failed`: where math-verify is not installed, every reward would be wrong.
        exit_code = self._workers[slot].end(patience_seconds=_EXIT_SECONDS)
        self._failed_starts += 1
        self._replace(slot)
        if self._failed_starts >= _MAX_FAILED_STARTS:
            raise RuntimeError(
                f"{self._failed_starts} verifier workers in a row ended before they started a check (exit code "
                f"{exit_code}); their error is on stderr. Is math-verify installed for {sys.executable}?"
            )
        waiting.appendleft(index)

    def _replace(self, slot: int) -> None:
        self._workers[slot].end()
        self._workers[slot] = _Worker(self._timeout_seconds)


class _Worker:
    """One process, the socket to it, and the call it has, if any."""

    def __init__(self, timeout_seconds: float) -> None:
        self.call_index: int | None = None
        self.started = False
        self.deadline = 0.0
        self._timeout_seconds = timeout_seconds
        self.connection, theirs = socket.socketpair()
        # Bounds the sending to a worker that never reads, and the reading of a result that never ends.
        self.connection.settimeout(START_SECONDS)
        with theirs:
            # The worker resolves imports as this process does; one thread: a check is small, and cores are shared.
            paths = [path or os.getcwd() for path in sys.path]
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join(paths),
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            }
            arguments = [str(theirs.fileno()), str(os.getpid()), str(timeout_seconds)]
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "megatron_r1v2.rewards.verifier_worker", *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def send(self, index: int, call: Call[ResultT]) -> bool:
        """Send a call; return False when the worker is gone."""
        body = json.dumps([call.module, call.function, call.arguments, call.imports]).encode()
        self.call_index, self.started = index, False
        self.deadline = time.monotonic() + START_SECONDS
        try:
            self.connection.sendall(LENGTH.pack(len(body)) + body)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            return False
        return True

    def read_started(self) -> bool:
        """Start the time limit of the check; return False when the worker is gone."""
        self.started = read_exactly(self.connection, len(STARTED)) == STARTED
        self.deadline = time.monotonic() + self._timeout_seconds
        return self.started

    def read_result(self) -> bytes | None:
        """Return the result as JSON, or None when the worker is gone."""
        header = read_exactly(self.connection, LENGTH.size)
        return read_exactly(self.connection, LENGTH.unpack(header)[0]) if header is not None else None

    def end(self, *, patience_seconds: float = 0.0) -> int:
        """End the process and return its exit code, its own if it exits within `patience_seconds`."""
        self.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience_seconds)
        self.process.kill()
        return self.process.wait()
