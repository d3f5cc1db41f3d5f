"""The watch over real tensors: bytes, FLOPs and collectives by phase, nothing changed."""

import pytest
import torch
import torch.distributed as dist

from megatron_r1v2.rehearsal.watch import Watch, unwatched


def test_it_counts_what_operators_make_and_compute():
    watch = Watch("cpu")
    one = torch.ones(4, 8)
    with watch, watch.phase("product"):
        product = one @ one.T
        with unwatched():
            unseen = torch.zeros(1000)
    assert torch.equal(product, torch.full((4, 4), 8.0)), "the numbers are the operator's own"
    (phase,) = watch.ledger.phases
    assert phase.peak == product.nbytes, "views and unwatched tensors are not new"
    assert watch.flops == {"product": 2 * 4 * 8 * 4}
    watch.add_flops(5)
    assert watch.flops["start"] == 5
    del unseen


@pytest.fixture
def alone():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_it_notes_collectives_with_group_dtype_and_size(alone):
    watch = Watch("cpu")
    tensor = torch.ones(3, dtype=torch.bfloat16)
    with watch, watch.phase("sum"):
        dist.all_reduce(tensor)
    (call,) = watch.collectives.calls
    assert (call.kind, call.ranks, call.dtype, call.count, call.num_bytes, call.phase) == (
        "allreduce_",
        (0,),
        "bfloat16",
        3,
        6,
        "sum",
    )


def test_phases_are_announced_and_the_one_that_an_error_ended_stays_the_last():
    announced = []
    watch = Watch("cpu", on_phase=announced.append)
    with watch.phase("step"), watch.phase_alone("load"):
        pass
    assert announced == ["step", "load", "step", "start"]
    with pytest.raises(RuntimeError), watch.phase("update"):
        raise RuntimeError
    assert announced[4:] == ["update"]
