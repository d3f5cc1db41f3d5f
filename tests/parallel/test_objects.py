"""Collectives of Python objects: order, different sizes, groups that are a part of the world."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from megatron_r1v2.parallel import objects
from tests.ranks import run_ranks


def collectives() -> dict[str, object]:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=size)
    alone = [dist.new_group([member]) for member in range(size)][rank]
    # Not the first ranks of the world: the first rank of a group is not rank 0.
    upper = dist.new_group([1, 2])
    world = dist.group.WORLD
    assert world is not None
    results: dict[str, object] = {
        "everyone": objects.all_gather({"rank": rank, "text": "x" * 1000 * rank}),
        "exchanged": objects.exchange([(rank, to, b"x" * 100 * rank * to) for to in range(size)], world, CPU),
        "exchanged alone": objects.exchange([f"item of {rank}"], alone, CPU),
    }
    if rank:
        results["upper"] = objects.all_gather(rank, upper)
        results["announced"] = objects.broadcast_from_first(f"from {rank}" if rank == 1 else None, upper)
    return results


CPU = torch.device("cpu")


def test_every_rank_gets_the_right_objects():
    ranks = run_ranks(3, collectives)
    for rank, results in enumerate(ranks):
        assert results["everyone"] == [{"rank": other, "text": "x" * 1000 * other} for other in range(3)]
        assert results["exchanged"] == [(sender, rank, b"x" * 100 * sender * rank) for sender in range(3)]
        assert results["exchanged alone"] == [f"item of {rank}"]
    for results in ranks[1:]:
        assert results["upper"] == [1, 2]
        assert results["announced"] == "from 1"
