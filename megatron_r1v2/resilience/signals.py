"""Signals that ask the run to end: SLURM sends SIGUSR1 some minutes before the time is up, SIGTERM some seconds.

SIGUSR1: finish the step, save, end. SIGTERM: abandon the step, end within `checkpoint.grace_seconds`; what was finished
of it is on disk (rollout_cache.py).
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
from multiprocessing import resource_tracker
from types import FrameType

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_END_OF_WATCH = b"\0"


class StepAbandoned(Exception):
    """Raised on all ranks when the step in progress is given up."""


class StopSignals:
    """The signals that this process receives while the block runs.

    A thread hears them, since the main one may be in a collective, where Python runs no handler. The main thread has
    them blocked, and so have the processes that it starts (verifiers, the checkpoint writer and its manager): SLURM
    signals every process of a step, and those must outlive the signal to finish their work.

    Args:
        grace_seconds: after SIGTERM, until the process ends whatever it is doing.
    """

    def __init__(self, device: torch.device, *, grace_seconds: float = 25.0) -> None:
        self._device = device
        self._grace_seconds = grace_seconds
        self._deadline: float | None = None
        self._received: set[int] = set()

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
        """Collective over all ranks: return the most urgent signal that any has received; None: none has come."""
        urgency = max((_SIGNALS.index(signal.Signals(number)) + 1 for number in self._received), default=0)
        agreed = self._all_reduce_max(urgency)
        return _SIGNALS[agreed - 1] if agreed else None

    @property
    def sigterm_received(self) -> bool:
        """Return whether this rank has received SIGTERM; the others may not have."""
        return signal.SIGTERM in self._received

    def abandon_step_if_asked(self) -> None:
        """Collective over all ranks: give the step up when any has received SIGTERM.

        Raises:
            StepAbandoned: on all of them.
        """
        if self._all_reduce_max(int(self.sigterm_received)):
            raise StepAbandoned

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
            left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            if not select.select([self._ears], [], [], left)[0]:
                self._leave()
            heard = self._ears.recv(64)
            if _END_OF_WATCH in heard:
                return
            self._received.update(number for number in heard if number in _SIGNALS)
            if signal.SIGTERM in self._received and self._deadline is None:
                self._deadline = time.monotonic() + self._grace_seconds

    def _leave(self) -> None:
        """End the process: the main thread may be in a collective that others have left, or deep in an update."""
        print(
            f"rank {os.environ.get('RANK', '0')}: ending in the middle of a step, since SIGTERM came "
            f"checkpoint.grace_seconds={self._grace_seconds:g} ago; start again to go on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        # Children outlive the signals on purpose; without a parent they would outlive the job too.
        for child in multiprocessing.active_children():
            child.kill()
        # sys.exit would end this thread only, and exit handlers would wait for collectives.
        os._exit(128 + signal.SIGTERM)


def _heard_by_the_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing: without a handler the signal would end the process."""
