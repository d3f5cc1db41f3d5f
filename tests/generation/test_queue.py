"""The shared queue: every prompt goes to one replica, and the ranks of a replica see the same ones."""

from __future__ import annotations

import torch

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.generation.queue import SharedPromptQueue
from megatron_r1v2.parallel import groups
from megatron_r1v2.types import Prompt
from tests.ranks import run_ranks

NAMES = [f"prompt-{number}" for number in range(9)]


def make_prompts() -> list[Prompt]:
    return [Prompt(name, (), (1, 2, 3), torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "", "exact") for name in NAMES]


def take_all(layout: ParallelConfig) -> dict[str, object]:
    context = groups.initialize(layout, seed=1)
    prompts = make_prompts()
    first = SharedPromptQueue(prompts, context=context, name="step-1")
    taken = [prompt.key for prompt in first]
    again = [prompt.key for prompt in first]
    second = [prompt.key for prompt in SharedPromptQueue(prompts, context=context, name="step-2")]
    return {
        "replica": context.data_rank,
        "share": first.fair_share,
        "taken": taken,
        "again": again,
        "second": second,
    }


def test_each_prompt_goes_to_one_of_two_replicas():
    ranks = run_ranks(2, take_all, ParallelConfig())
    for name in ("taken", "second"):
        assert sorted(ranks[0][name] + ranks[1][name]) == NAMES
        assert all(rank[name] == sorted(rank[name]) for rank in ranks), "in the order of the list"
    assert [rank["again"] for rank in ranks] == [[], []], "a counter is used up"
    assert [rank["share"] for rank in ranks] == [5, 5]


def test_the_ranks_of_a_replica_take_the_same_prompts():
    ranks = run_ranks(4, take_all, ParallelConfig(tensor=2))
    by_replica = [[rank["taken"] for rank in ranks if rank["replica"] == replica] for replica in (0, 1)]
    assert all(one == other for one, other in by_replica)
    assert sorted(by_replica[0][0] + by_replica[1][0]) == NAMES


def test_one_replica_gets_the_whole_list_each_time():
    (rank,) = run_ranks(1, take_all, ParallelConfig())
    assert rank["taken"] == rank["again"] == NAMES
    assert rank["share"] == 9
