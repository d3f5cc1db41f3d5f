"""The memory of this rank's GPU: now, and the peak of each phase of a step."""

from __future__ import annotations

from typing import Protocol

import torch

_GIB = 2**30


class MemoryStatistics(Protocol):
    """The interface of torch.cuda, as far as it is used."""

    def memory_allocated(self) -> int:
        """Return the bytes that tensors hold."""

    def memory_reserved(self) -> int:
        """Return the bytes that the allocator holds."""

    def max_memory_allocated(self) -> int:
        """Return the most bytes that tensors have held since the last reset."""

    def reset_peak_memory_stats(self) -> None:
        """Begin a new peak."""


class DeviceMemory:
    """The peaks of the phases that begin and end; phases may lie within each other."""

    def __init__(self, statistics: MemoryStatistics | None) -> None:
        """Take the statistics of a device; None: it has none, and nothing is measured."""
        self._statistics = statistics
        self._open: list[int] = []
        """The peak so far of each phase that has begun, the innermost last."""
        self._peaks: dict[str, int] = {}

    @classmethod
    def of(cls, device: torch.device) -> DeviceMemory:
        """Return the memory of a device, which only a GPU tells."""
        return cls(torch.cuda if device.type == "cuda" else None)

    def begin(self) -> None:
        """Begin a phase."""
        if self._statistics is None:
            return
        self._raise_innermost(self._statistics.max_memory_allocated())
        self._open.append(0)
        self._statistics.reset_peak_memory_stats()

    def end(self, phase: str) -> None:
        """End the phase that began last."""
        if self._statistics is None:
            return
        peak = max(self._open.pop(), self._statistics.max_memory_allocated())
        self._peaks[phase] = max(self._peaks.get(phase, 0), peak)
        self._raise_innermost(peak)
        self._statistics.reset_peak_memory_stats()

    def take(self) -> dict[str, float]:
        """Return the memory in GiB by metric, and begin a new step; empty where nothing is measured."""
        if self._statistics is None:
            return {}
        peaks, self._peaks = self._peaks, {}
        return {
            "memory_gib/allocated": self._statistics.memory_allocated() / _GIB,
            "memory_gib/reserved": self._statistics.memory_reserved() / _GIB,
            **{f"memory_gib/{phase}_peak": peak / _GIB for phase, peak in peaks.items()},
        }

    def _raise_innermost(self, peak: int) -> None:
        if self._open:
            self._open[-1] = max(self._open[-1], peak)
