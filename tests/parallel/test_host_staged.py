"""The backend of ranks that share a GPU, with tensors on the CPU: it copies them all the same."""

from __future__ import annotations

import datetime
import os

import pytest
import torch
import torch.distributed as dist

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.parallel import host_staged
from tests.distributed.steps import Material, Outcome, make_material, run_step
from tests.distributed.test_step import TOGETHER, UNEQUAL, check_gradients, difference
from tests.ranks import run_ranks
from tests.tiny_hf import tiny_hf_model, tiny_vision_config

LAYOUTS = {
    "SP2": ({"tensor": 2, "sequence": True}, TOGETHER),
    "PP2": ({"pipeline": 2}, TOGETHER),
    "DP2": ({}, UNEQUAL),
}


def start() -> None:
    host_staged.register()
    dist.init_process_group(
        host_staged.NAME,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(minutes=5),
    )


def collectives() -> dict[str, torch.Tensor]:
    start()
    rank = dist.get_rank()
    mine = torch.arange(4.0) + 10 * rank
    results = {"all_reduce": mine.clone(), "broadcast": mine.clone()}
    dist.all_reduce(results["all_reduce"])
    dist.broadcast(results["broadcast"], src=1)
    results["all_gather_into_tensor"] = torch.zeros(8)
    dist.all_gather_into_tensor(results["all_gather_into_tensor"], mine)
    results["reduce_scatter_tensor"] = torch.zeros(2)
    dist.reduce_scatter_tensor(results["reduce_scatter_tensor"], mine)
    # As the distributed optimizer does: what comes out is a part of what goes in.
    both = torch.cat([mine, mine])
    dist.all_gather_into_tensor(both, both[4 * rank :][:4])
    results["in place"] = both
    results["all_to_all_single"] = torch.zeros(4)
    dist.all_to_all_single(results["all_to_all_single"], mine)
    received = torch.zeros(4)
    works = [dist.isend(mine, dst=1 - rank), dist.irecv(received, src=1 - rank)]
    for work in works:
        work.wait()
    results["isend and irecv"] = received
    gathered: list = [None, None]
    dist.all_gather_object(gathered, {"rank": rank})
    assert gathered == [{"rank": 0}, {"rank": 1}]
    dist.barrier()
    assert dist.get_backend() == host_staged.NAME
    return results


def test_collectives_give_what_gloo_gives():
    first, second = run_ranks(2, collectives)
    zero, one = torch.arange(4.0), torch.arange(4.0) + 10
    for rank, results in enumerate((first, second)):
        expected = {
            "all_reduce": zero + one,
            "broadcast": one,
            "all_gather_into_tensor": torch.cat([zero, one]),
            "reduce_scatter_tensor": (zero + one)[2 * rank :][:2],
            "in place": torch.cat([zero, one]),
            "all_to_all_single": torch.cat([zero[2 * rank :][:2], one[2 * rank :][:2]]),
            "isend and irecv": one if rank == 0 else zero,
        }
        assert {name: results[name].tolist() for name in results} == {
            n: value.tolist() for n, value in expected.items()
        }


def take_steps(folder: str, material: Material) -> dict[str, Outcome]:
    start()
    return {
        name: run_step(folder, material, ParallelConfig(**parallel), split)
        for name, (parallel, split) in LAYOUTS.items()
    }


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> tuple[Material, list[dict[str, Outcome]]]:
    folder = tmp_path_factory.mktemp("staged")
    material = make_material(tiny_hf_model(folder, "6b", vision=tiny_vision_config("6b", heads=5)))
    return material, run_ranks(2, take_steps, str(folder), material)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_has_the_gradients_of_transformers(name, steps):
    material, ranks = steps
    check_gradients(ranks[0][name].gradients, material.gradients)
    assert ranks[0][name].metrics["actor/loss"] == pytest.approx(material.loss, rel=1e-5)
    for rank in ranks:
        for sample, log_probs in rank[name].log_probs.items():
            assert difference(log_probs, material.log_probs[sample]) < 1e-5
