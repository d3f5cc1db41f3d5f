"""Commands of the first rank arrive on all ranks, in their order, and on all ranks of a group at once."""

from __future__ import annotations

import time

import torch.distributed as dist

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.parallel import groups
from megatron_r1v2.resilience.rank_commands import RankCommands
from tests.ranks import run_ranks


def received_one_by_one(commands: RankCommands, count: int) -> list[str]:
    received: list[str] = []
    while len(received) < count:
        command = commands.receive()
        if command is not None:
            received.append(command)
    return received


def command_all() -> tuple[list[str], str | None, int]:
    commands = RankCommands(groups.initialize(ParallelConfig(), seed=1))
    if dist.get_rank() == 0:
        for command in ("publish", "publish", "go on"):
            commands.send(command)
    return received_one_by_one(commands, 3), commands.receive(), dist.get_rank()


def test_every_rank_receives_each_command_once_in_order() -> None:
    for received, more, _ in run_ranks(2, command_all):
        assert received == ["publish", "publish", "go on"]
        assert more is None


def receive_together() -> list[int]:
    """Rank 0 sends between the looks of the two: what one has seen both get in the same look."""
    context = groups.initialize(ParallelConfig(tensor=2), seed=1)
    commands = RankCommands(context)
    looks = []
    for look in range(60):
        if dist.get_rank() == 0 and look in (20, 40):
            commands.send(f"at {look}")
        else:
            time.sleep(0.001)
        command = commands.receive(context.groups.mp)
        if command is not None:
            assert command == ("at 20", "at 40")[len(looks)]
            looks.append(look)
    return looks


def test_ranks_of_a_group_receive_in_the_same_look() -> None:
    first, second = run_ranks(2, receive_together)
    assert first == second
    assert len(first) == 2


def report_events() -> list[int]:
    context = groups.initialize(ParallelConfig(), seed=1)
    commands = RankCommands(context)
    before = commands.count_reports("written 1")
    dist.barrier()
    for _ in range(3):
        commands.report("written 1")
    if dist.get_rank() == 1:
        commands.report("abandon")
    dist.barrier()
    return [before, commands.count_reports("written 1"), commands.count_reports("abandon")]


def test_a_rank_counts_once_for_an_event() -> None:
    assert run_ranks(2, report_events) == [[0, 2, 1], [0, 2, 1]]
