"""The key-value store of the process groups, asked with a time limit: the process that holds it may be stopped."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Protocol, TypeVar, cast

import torch.distributed as dist

Answer = TypeVar("Answer")


class KeyValueStore(Protocol):
    """The interface of torch's stores, as far as it is used: their stubs lack parts of it."""

    timeout: timedelta

    def set(self, key: str, value: str) -> None:
        """Write a value."""

    def get(self, key: str) -> bytes:
        """Wait for a value and return it."""

    def add(self, key: str, amount: int) -> int:
        """Add to a counter and return it."""

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys are written."""


class GroupStore:
    """The store that all ranks share, asked by one thread that outlives no process.

    torch's own time limit holds for keys that are waited for, not for a store whose process is stopped: a call into it
    then never returns. So a daemon thread makes the calls, and who asks waits for it no longer than the groups' limit.
    """

    def __init__(self, store: KeyValueStore | None = None) -> None:
        """Take a store, by default that of the process groups, which must be up."""
        self._store = store or cast(KeyValueStore, dist.distributed_c10d._get_default_store())  # noqa: SLF001
        self._questions: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def set(self, key: str, value: str) -> None:
        """Write a value for all ranks to read."""
        self._ask(lambda store: store.set(key, value))

    def get(self, key: str) -> str:
        """Return a value, waiting until it is written."""
        return self._ask(lambda store: store.get(key)).decode()

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, which begins at 0, and return what it is now."""
        return self._ask(lambda store: store.add(key, amount))

    def has(self, keys: Sequence[str]) -> bool:
        """Return whether all of these keys are written."""
        return self._ask(lambda store: store.check(list(keys)))

    def _ask(self, question: Callable[[KeyValueStore], Answer]) -> Answer:
        """Return what the store answers.

        Raises:
            RuntimeError: no answer came within the time limit of the process groups, or the store is gone.
        """
        if dist.get_world_size() == 1:  # the store is in this process, which cannot wait for itself
            return question(self._store)
        self._start()
        answer: Future[Answer] = Future()
        self._questions.put(lambda: _answer(answer, lambda: question(self._store)))
        seconds = self._store.timeout.total_seconds()
        try:
            return answer.result(seconds)
        except TimeoutError:
            answer.cancel()  # a store that answers late must not be asked what nobody waits for
            raise RuntimeError(
                f"the store of the process groups has not answered for {seconds:.0f} s "
                "(parallel.timeout_minutes): the first rank, or the torchrun that started it, hangs or is out of reach"
            ) from None

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                # A daemon: what is asked of a stopped process must not keep this one from ending.
                self._thread = threading.Thread(target=self._answer_all, name="group-store", daemon=True)
                self._thread.start()

    def _answer_all(self) -> None:
        while True:
            self._questions.get()()


def _answer(answer: Future[Answer], question: Callable[[], Answer]) -> None:
    if not answer.set_running_or_notify_cancel():
        return
    try:
        answer.set_result(question())
    except (RuntimeError, ValueError) as error:  # torch's DistStoreError and the like: for the thread that asked
        answer.set_exception(error)
