"""Layouts that follow one another in the same processes: each is the one that was asked for, and leaves nothing."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1v2.config.schema import ParallelConfig
from tests.parallel_layouts import start_layout
from tests.ranks import run_ranks

TP2, SP2, PP2 = ParallelConfig(tensor=2), ParallelConfig(tensor=2, sequence=True), ParallelConfig(pipeline=2)


def gloo_threads() -> int:
    return sum("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir())


def layouts_in_turn() -> list[tuple]:
    """Return sizes, the sums over both groups, threads, and the tensor-parallel group of each."""
    seen = []
    for parallel in (TP2, SP2, PP2, TP2):
        context = start_layout(parallel)
        sums = [torch.tensor(1.0), torch.tensor(1.0)]
        dist.all_reduce(sums[0], group=context.groups.tp)
        dist.all_reduce(sums[1], group=context.groups.pp)
        drawn = torch.rand(1).item()
        sizes = (context.tensor_size, context.pipeline_size, context.data_size)
        seen.append((sizes, [each.item() for each in sums], gloo_threads(), context.groups.tp.group_name, drawn))
        del context
    return seen


def test_each_layout_has_groups_of_its_own_sizes_and_ends_those_before():
    for first, second, third, fourth in run_ranks(2, layouts_in_turn):
        assert [each[:2] for each in (first, second, third, fourth)] == [
            ((2, 1, 1), [2.0, 1.0]),
            ((2, 1, 1), [2.0, 1.0]),
            ((1, 2, 1), [1.0, 2.0]),
            ((2, 1, 1), [2.0, 1.0]),
        ]
        assert first[3] == second[3], "groups of the same sizes go on"
        assert fourth[3] != first[3]
        assert first[2] == second[2] == fourth[2] > 10, "no thread outlives its group"
        assert first[4] == second[4] == fourth[4], "each starts from the seed"
