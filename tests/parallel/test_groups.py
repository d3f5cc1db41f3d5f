"""Each rank's place in a layout, the groups it gets, and layouts that do not fit."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.parallel import groups, host_staged
from tests.ranks import run_ranks

LAYOUT = ParallelConfig(tensor=2, pipeline=2, timeout_minutes=3.5)


def place() -> dict[str, object]:
    context = groups.initialize(LAYOUT, seed=7)
    control = groups.make_control_group(LAYOUT)
    assert control is not None
    with tensor_parallel.get_cuda_rng_tracker().fork():
        drawn = torch.rand(1).item()
    result: dict[str, object] = {
        "tensor": (context.tensor_rank, context.tensor_size),
        "pipeline": (context.pipeline_rank, context.pipeline_size),
        "data": (context.data_rank, context.data_size),
        "is_first_stage": context.is_first_stage,
        "is_last_stage": context.is_last_stage,
        "is_replica_leader": context.is_replica_leader,
        "is_main": context.is_main,
        "last_stage_rank": context.last_stage_rank,
        "replica": dist.get_process_group_ranks(context.groups.mp),
        "control": (dist.get_process_group_ranks(control), dist.get_backend(control)),
        "device": str(context.device),
        "drawn": drawn,
    }
    again = groups.current_context()
    assert (again.device, again.tensor_rank, again.pipeline_rank, again.data_rank) == (
        context.device,
        context.tensor_rank,
        context.pipeline_rank,
        context.data_rank,
    )
    groups.shut_down()
    assert not dist.is_initialized()
    return result


@pytest.fixture(scope="module")
def places() -> list[dict]:
    return run_ranks(8, place)


def test_tensor_ranks_are_neighbours_then_data_then_stages(places):
    for rank, result in enumerate(places):
        assert result["tensor"] == (rank % 2, 2)
        assert result["data"] == (rank // 2 % 2, 2)
        assert result["pipeline"] == (rank // 4, 2)
        assert result["device"] == "cpu"


def test_a_replica_is_every_stage_and_part_of_one_model(places):
    assert {tuple(result["replica"]) for result in places} == {(0, 1, 4, 5), (2, 3, 6, 7)}
    assert all(rank in result["replica"] for rank, result in enumerate(places))
    assert all(result["control"] == (list(range(8)), "gloo") for result in places)


def test_each_role_has_its_ranks(places):
    def ranks(role):
        return [rank for rank, result in enumerate(places) if result[role]]

    assert ranks("is_first_stage") == [0, 1, 2, 3]
    assert ranks("is_last_stage") == [4, 5, 6, 7]
    assert ranks("is_replica_leader") == [0, 2]
    assert ranks("is_main") == [0]
    assert [result["last_stage_rank"] for result in places] == [4, 5, 6, 7, 4, 5, 6, 7]


def test_tensor_ranks_draw_their_own_numbers_and_replicas_the_same(places):
    drawn = [result["drawn"] for result in places]
    assert drawn[0] != drawn[1]
    assert drawn[:2] == drawn[2:4]


def alone() -> tuple[bool, datetime.timedelta]:
    os.environ["MASTER_PORT"] = "1"  # a port that a process alone does not use
    groups.initialize(ParallelConfig(timeout_minutes=3.5), seed=1)
    control = groups.make_control_group(ParallelConfig())
    backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    return control is None, backend.options._timeout


def test_a_single_rank_needs_no_port_and_no_control_group():
    ((no_control_group, timeout),) = run_ranks(1, alone)
    assert no_control_group
    assert timeout == datetime.timedelta(minutes=3.5)


@pytest.mark.parametrize(
    ("layout", "world_size", "message"),
    [
        (ParallelConfig(tensor=2), 3, r"tensor=2 x parallel.pipeline=1 needs a multiple of 2 processes, got 3"),
        (ParallelConfig(tensor=2, pipeline=4), 4, r"needs a multiple of 8 processes, got 4; .*--nproc-per-node"),
        (ParallelConfig(sequence=True), 2, r"parallel.sequence=true splits .* but parallel.tensor=1"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout, world_size, message):
    with pytest.raises(ValueError, match=message):
        groups.check_world_size(layout, world_size)


def test_a_layout_that_fits_is_accepted():
    groups.check_world_size(ParallelConfig(tensor=2, pipeline=2, sequence=True), 8)


def test_the_backend_depends_on_how_many_ranks_share_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert groups._backend() == "nccl"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert groups._backend() == host_staged.NAME
    assert groups._device() == torch.device("cuda", 2)
    assert chosen == [torch.device("cuda", 2)]


def gloo_threads() -> int:
    return sum("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir())


def test_no_thread_of_a_group_outlives_the_run_that_started_it():
    """A model that has computed positions is in a cache of megatron-core, with its groups."""
    counts = []
    for _ in range(3):
        context = groups.initialize(ParallelConfig(), seed=7)
        assert gloo_threads() > 10
        positions = RotaryEmbedding(8, 1.0, use_cpu_initialization=True, cp_group=context.groups.cp)
        assert positions(4).shape == (4, 1, 1, 8)
        del context, positions
        groups.shut_down()
        counts.append(gloo_threads())
    # megatron-core keeps a few groups of the last run.
    assert counts[0] == counts[1] == counts[2]
