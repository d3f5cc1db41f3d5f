"""Bytes of the tensors that live at once: what holds them, the peak of each phase, and the line of code at the peak."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

PARAMETERS = "parameters"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"
ACTIVATIONS = "activations"
KV_CACHE = "kv_cache"
IMAGE_FEATURES = "image_features"
BUFFERS = "buffers"
CATEGORIES = (PARAMETERS, GRADIENTS, OPTIMIZER, BUFFERS, KV_CACHE, IMAGE_FEATURES, ACTIVATIONS)
"""The terms of the planner, in the order in which the chart stacks them."""

_MOST_SAMPLES = 2000
_OWN_CODE = ("/megatron_r1v2/", "/megatron/core/")
_NOT_SHOWN = "/megatron_r1v2/rehearsal/"
_RAISED_IN = "rehearsed phase: "


@dataclass
class PhaseMemory:
    """The memory of one phase."""

    name: str
    held_before: int
    peak: int
    """Bytes at the fullest moment, those held before included."""
    held_after: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    """Bytes by category at the fullest moment."""
    line: str = ""
    """The lines of code that were running then, the innermost first."""
    flops: int = 0
    """Computed in it, those of phases inside it left out."""
    storages_at_peak: int = 0
    """The number of storages that had been made in the rehearsal at the fullest moment."""


@dataclass(frozen=True)
class Sample:
    """The bytes held at one moment of the step."""

    phase: str
    held: Mapping[str, int]


@dataclass
class _Storage:
    size: int
    category: str
    number: int
    """Of all that were made."""
    alive: weakref.ref[torch.UntypedStorage]


class MemoryLedger:
    """The live storages of one kind of device."""

    def __init__(self) -> None:
        self.held = 0
        self.by_category: Counter[str] = Counter()
        self.phases: list[PhaseMemory] = []
        """In the order in which they began."""
        self.samples: list[Sample] = []
        """The course of the step, for the chart."""
        self._category = ACTIVATIONS
        self._live: dict[int, _Storage] = {}
        self._open: list[PhaseMemory] = []
        self._made = 0
        self._between_samples = 0
        self._since_sample = 0

    def add(self, made: Iterable[torch.Tensor], before: Iterable[torch.Tensor] = ()) -> None:
        """Count the storages of tensors that an operator made.

        Args:
            before: the operator's inputs, whose storages are not new.
        """
        known: set[int] | None = None
        for tensor in made:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._live:
                continue
            if known is None:
                known = {each.untyped_storage()._cdata for each in before}
            if key not in known:
                self._count(key, storage)

    @contextmanager
    def holding(self, category: str) -> Iterator[None]:
        """Count what is made inside the block as a category."""
        former, self._category = self._category, category
        try:
            yield
        finally:
            self._category = former

    def assign(self, tensors: Iterable[torch.Tensor], category: str) -> None:
        """Count tensors that were made before as a category, also in the peaks of open phases that they are part of."""
        for tensor in tensors:
            found = self._live.get(tensor.untyped_storage()._cdata)
            if found is None:
                continue
            peaks = [phase.at_peak for phase in self._open if found.number <= phase.storages_at_peak]
            for held in (self.by_category, *peaks):
                held[found.category] -= found.size
                held[category] = held.get(category, 0) + found.size
            found.category = category

    @contextmanager
    def phase(self, name: str, *, alone: bool = False) -> Iterator[PhaseMemory]:
        """Watch the peak of a phase; phases may lie in each other.

        Args:
            alone: its peak is none of the phases around it.
        """
        around, self._open = self._open, [] if alone else self._open
        # An engine of megatron-core that is no longer used lives until Python collects it, which happens at no fixed
        # moment: a phase begins without such engines, rehearsed and real alike.
        gc.collect()
        phase = PhaseMemory(name, self.held, self.held, at_peak=dict(self.by_category), storages_at_peak=self._made)
        self.phases.append(phase)
        self._open.append(phase)
        self._sample()
        try:
            yield phase
        except BaseException as error:
            # On the error itself: what is raised on its way out, and phases that begin then, must not hide it.
            if not phase_of(error):
                error.add_note(f"{_RAISED_IN}{name}")
            raise
        finally:
            self._open.pop()
            self._open = around
            phase.held_after = self.held
            self._sample()

    @property
    def current_phase(self) -> str:
        """Return the innermost phase."""
        return self._open[-1].name if self._open else "start"

    def add_flops(self, number: int) -> None:
        """Count FLOPs for the innermost phase."""
        if self._open:
            self._open[-1].flops += number

    def _count(self, key: int, storage: torch.UntypedStorage) -> None:
        size, category = storage.nbytes(), self._category
        self._made += 1
        alive = weakref.ref(storage, lambda _: self._forget(key))
        self._live[key] = _Storage(size, category, self._made, alive)
        self.held += size
        self.by_category[category] += size
        self._since_sample += size
        line = ""
        for phase in self._open:
            if self.held > phase.peak:
                line = line or running_line()
                phase.peak, phase.line, phase.at_peak = self.held, line, dict(self.by_category)
                phase.storages_at_peak = self._made
        if self._since_sample > self.held // 200:
            self._sample()

    def _forget(self, key: int) -> None:
        storage = self._live.pop(key)
        self.held -= storage.size
        self.by_category[storage.category] -= storage.size
        self._since_sample += storage.size

    def _sample(self) -> None:
        self._since_sample = 0
        self.samples.append(Sample(self.current_phase, dict(self.by_category)))
        if len(self.samples) > _MOST_SAMPLES:
            # Every second one: the chart has no more columns, and no step may fill the memory.
            del self.samples[1::2]


def phase_of(error: BaseException) -> str:
    """Return the innermost phase that an exception, or the first one that led to it, has ended; empty: none."""
    cause = error.__cause__ or error.__context__
    notes = (note.removeprefix(_RAISED_IN) for note in getattr(error, "__notes__", ()) if note.startswith(_RAISED_IN))
    return (phase_of(cause) if cause is not None else "") or next(notes, "")


def running_line(count: int = 3) -> str:
    """Return the innermost lines of our code and of megatron-core's that are running, as file:line function."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < count:
        name = frame.f_code.co_filename
        if any(part in name for part in _OWN_CODE) and _NOT_SHOWN not in name:
            short = next(name[name.rindex(part) + 1 :] for part in _OWN_CODE if part in name)
            found.append(f"{short}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
    return " < ".join(found) or "?"
