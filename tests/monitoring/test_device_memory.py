"""Peaks of phases, also of one within another."""

import torch

from megatron_r1v2.monitoring.device_memory import DeviceMemory

GIB = 2**30


class Statistics:
    """An allocator that keeps its peak, as torch.cuda does."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def use(self, gib: int) -> None:
        self.now = gib * GIB
        self.peak = max(self.peak, self.now)

    def memory_allocated(self) -> int:
        return self.now

    def memory_reserved(self) -> int:
        return self.now + GIB

    def max_memory_allocated(self) -> int:
        return self.peak

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.now


def test_each_phase_has_its_own_peak_and_the_outer_one_that_of_the_inner() -> None:
    statistics = Statistics()
    memory = DeviceMemory(statistics)
    memory.begin()
    statistics.use(5)
    statistics.use(1)
    memory.begin()
    statistics.use(3)
    statistics.use(2)
    memory.end("inner")
    memory.end("outer")
    memory.begin()
    statistics.use(4)
    memory.end("after")
    expected = {"allocated": 4.0, "reserved": 5.0, "inner_peak": 3.0, "outer_peak": 5.0, "after_peak": 4.0}
    assert memory.take() == {f"memory_gib/{name}": value for name, value in expected.items()}
    # A new step: the peak of a phase is the largest of the times it ran.
    for gib in (6, 2):
        memory.begin()
        statistics.use(gib)
        memory.end("generate")
    taken = memory.take()
    assert "memory_gib/inner_peak" not in taken
    assert taken["memory_gib/generate_peak"] == 6.0


def test_an_inner_peak_above_that_of_the_outer_phase_counts_for_it() -> None:
    statistics = Statistics()
    memory = DeviceMemory(statistics)
    memory.begin()
    memory.begin()
    statistics.use(7)
    statistics.use(0)
    memory.end("inner")
    memory.end("outer")
    assert memory.take()["memory_gib/outer_peak"] == 7.0


def test_a_cpu_tells_nothing() -> None:
    memory = DeviceMemory.of(torch.device("cpu"))
    memory.begin()
    memory.end("update")
    assert memory.take() == {}
