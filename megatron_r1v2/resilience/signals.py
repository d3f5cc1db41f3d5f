"""Signals that ask the run to end: Ctrl-C, and SLURM's SIGUSR1 minutes before the time is up, SIGTERM seconds before.

SIGUSR1 and a first SIGINT (Ctrl-C): finish the step, save, end. SIGTERM and a second SIGINT: abandon the step, end
within `checkpoint.grace_seconds`; what was finished of it is on disk (rollout_cache.py).
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)
"""The most urgent last."""
_END_OF_WATCH = b"\0"
_TORCHRUN_SECONDS = 30.0
"""Between the SIGINT that torchrun passes on to its workers and its SIGKILL, where nothing else is set."""


class StepAbandoned(Exception):
    """Raised on all ranks when the step in progress is given up; its text names what asked for that."""


class StopSignals:
    """The signals that this process receives while the block runs.

    A thread hears them, since the main one may be in a collective, where Python runs no handler. The main thread has
    them blocked, and so have the processes that it starts (verifiers, the checkpoint writer and its manager): SLURM
    signals every process of a step, and those must outlive the signal to finish their work.

    Args:
        grace_seconds: after SIGTERM, until the process ends whatever it is doing.
        patience_seconds: after a first SIGINT, until the launcher kills the process; None: it does not.
    """

    def __init__(
        self, device: torch.device, *, grace_seconds: float = 25.0, patience_seconds: float | None = None
    ) -> None:
        self._device = device
        self._grace_seconds = grace_seconds
        self._patience_seconds = patience_seconds
        self._received: set[int] = set()
        self._abandon_at: float | None = None
        """When the step is to be given up; None: it is not."""
        self._reason = signal.SIGTERM.name
        self._last_words: Callable[[], None] = lambda: None

    def __enter__(self) -> StopSignals:
        # Python's C handler writes the signal's number into the socket at once, whatever the main thread is at; it must
        # not block there.
        self._ears, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._previous = {number: signal.signal(number, _heard_by_the_thread) for number in _SIGNALS}
        self._previous_fd = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        # The first process that is spawned starts it, and Python then unblocks SIGTERM: so it starts here.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        self._thread = threading.Thread(target=self._listen, name="stop-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        # A full buffer would lose the byte that ends the thread.
        self._mouth.setblocking(True)
        self._mouth.send(_END_OF_WATCH)
        self._thread.join()
        self._mouth.close()
        self._ears.close()
        # The mask first: a signal that is still pending is then taken by our handler, and not by one that ends the run.
        signal.pthread_sigmask(signal.SIG_SETMASK, self._previous_mask)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def sync_stop_signal(self) -> signal.Signals | None:
        """Collective over all ranks: return the most urgent signal that any has received; None: none has come.

        SIGTERM stands for a second SIGINT too.
        """
        received = {*self._received, *([signal.SIGTERM] if self.is_abandon_asked else [])}
        urgency = max((_SIGNALS.index(signal.Signals(number)) + 1 for number in received), default=0)
        agreed = self._all_reduce_max(urgency)
        return _SIGNALS[agreed - 1] if agreed else None

    @property
    def is_abandon_asked(self) -> bool:
        """Return whether this rank was asked to give the step up; the others may not have been."""
        return self._abandon_at is not None and time.monotonic() >= self._abandon_at

    @property
    def reason(self) -> str:
        """Return what asked to give the step up, for people."""
        return self._reason

    def call_before_leaving(self, last_words: Callable[[], None]) -> None:
        """Have something printed where the process must end in the middle of a step; it must not wait for others."""
        self._last_words = last_words

    def abandon_step_if_asked(self) -> None:
        """Collective over all ranks: give the step up when any was asked to.

        Raises:
            StepAbandoned: on all of them.
        """
        if self._all_reduce_max(int(self.is_abandon_asked)):
            raise StepAbandoned(self.reason)

    def _all_reduce_max(self, value: int) -> int:
        """Collective over all ranks: return the largest of their values."""
        if dist.get_world_size() == 1:
            return value
        largest = torch.tensor([value], device=self._device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest.item())

    def _listen(self) -> None:
        # A new thread inherits the mask of the main one, and the kernel gives a signal to a thread that takes it.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        while True:
            # Looked at here, not by a timer: a process in a collective must end in time too.
            left = None if self._abandon_at is None else self._abandon_at + self._grace_seconds - time.monotonic()
            if left is not None and left <= 0:
                self._leave()
            if not select.select([self._ears], [], [], left)[0]:
                continue
            heard = self._ears.recv(64)
            if _END_OF_WATCH in heard:
                return
            for number in heard:
                if number in _SIGNALS:
                    self._hear(signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if number is signal.SIGINT and signal.SIGINT not in self._received:
            left = None
            if self._patience_seconds is not None:
                left = max(0.0, self._patience_seconds - self._grace_seconds - 1.0)
                self._abandon_soon(now + left, f"SIGINT, {self._patience_seconds:g} s before torchrun kills")
            self._explain_interrupt(left)
        elif number is not signal.SIGUSR1:
            self._abandon_soon(now, "a second SIGINT" if number is signal.SIGINT else number.name)
        self._received.add(number)

    def _abandon_soon(self, when: float, reason: str) -> None:
        if self._abandon_at is None or when < self._abandon_at:
            self._abandon_at, self._reason = when, reason

    def _explain_interrupt(self, left: float | None) -> None:
        """Print on the first rank what the first Ctrl-C does, which shows nothing else until the step is done."""
        if os.environ.get("RANK", "0") != "0":
            return
        how = "Ctrl-C: the step is finished and saved first; Ctrl-C once more gives it up"
        if left is not None:
            how += f". torchrun kills its ranks {self._patience_seconds:g} s after Ctrl-C: a step of more than "
            how += f"{left:.0f} s is given up; start torchrun with --shutdown-timeout 3600 to have it finished"
        print(how, file=sys.stderr, flush=True)

    def _leave(self) -> None:
        """End the process: the main thread may be in a collective that others have left, or deep in an update."""
        print(
            f"rank {os.environ.get('RANK', '0')}: ending in the middle of a step, since {self._reason} came "
            f"checkpoint.grace_seconds={self._grace_seconds:g} ago; start again to go on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        self._last_words()
        # Children outlive the signals on purpose; without a parent they would outlive the job too.
        for child in multiprocessing.active_children():
            child.kill()
        # sys.exit would end this thread only, and exit handlers would wait for collectives.
        os._exit(128 + signal.SIGTERM)


def torchrun_patience() -> float | None:
    """Return how long torchrun leaves its workers after Ctrl-C before it kills them; None: it started no such run."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    command = Path(f"/proc/{os.getppid()}/cmdline")
    given = command.read_bytes().decode(errors="replace").split("\0") if command.is_file() else []
    return shutdown_timeout(given, os.environ)


def shutdown_timeout(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Return the --shutdown-timeout of a torchrun command, or what its environment says instead."""
    for option, value in pairwise([*command, ""]):
        name, _, joined = option.partition("=")
        if name in ("--shutdown-timeout", "--shutdown_timeout"):
            return float(joined or value)
    names = ("PET_SHUTDOWN_TIMEOUT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    return next((float(environment[name]) for name in names if name in environment), _TORCHRUN_SECONDS)


def _heard_by_the_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing: without a handler the signal would end the process."""
