"""A signal that asks the run to save and end: SLURM sends SIGUSR1 some minutes before the time is up."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist


class StopRequest:
    """Remembers SIGUSR1 while its block runs; a step is never cut in the middle."""

    def __init__(self, device: torch.device) -> None:
        """Prepare.

        Args:
            device: where the backend wants its tensors.
        """
        self._device = device
        self._received = False

    def __enter__(self) -> StopRequest:
        self._previous = signal.signal(signal.SIGUSR1, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGUSR1, self._previous)

    def is_made(self) -> bool:
        """Return whether any rank has received the signal; called together by all ranks."""
        flag = torch.tensor([int(self._received)], device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
