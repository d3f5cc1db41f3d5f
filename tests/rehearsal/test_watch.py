"""The watch over real tensors: bytes, FLOPs and collectives by phase; what a rehearsal replaces must exist."""

import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_r1v2.rehearsal.watch import Watch, original, replace, unwatched


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


def test_an_attribute_is_replaced_for_good():
    owner = SimpleNamespace(name=1)
    assert original(owner, "name") == 1
    replace(owner, "name", 2)
    assert owner.name == 2


def test_what_has_moved_is_an_error():
    with pytest.raises(AttributeError, match="moved"):
        replace(SimpleNamespace(), "moved", 1)


@pytest.mark.parametrize(
    "name",
    [
        # of torch 2.13, to which the lock pins the rehearsal
        "torch._C._DisableTorchDispatch",
        "torch._C._distributed_c10d.FakeWork",
        "torch._C._distributed_c10d.FakeProcessGroup",
        "torch._subclasses.fake_tensor.FakeTensor.fake_device",
        "torch._subclasses.fake_tensor.FakeTensor.tolist",
        "torch._subclasses.fake_tensor.FakeTensorMode.from_tensor",
        "torch.distributed.distributed_c10d.ProcessGroup.unbox",
        "torch.nn.Module._apply",
        "torch.utils._python_dispatch._disable_current_modes",
        "torch.utils._python_dispatch._get_current_dispatch_mode_stack",
        "torch.utils.flop_counter.flop_registry",
        "torch.cuda._lazy_call",
        "torch.cuda.nvtx._nvtx",
        # of megatron-core 0.16.1
        "megatron.core.dist_checkpointing.state_dict_utils.load_preprocess",
        "megatron.core.utils.GlobalMemoryBuffer.get_tensor",
        "megatron.core.transformer.attention.flash_attn_with_kvcache",
        "megatron.core.inference.contexts.dynamic_context.DynamicInferenceContext.update_requests",
        "megatron.core.inference.contexts.dynamic_context.DynamicInferenceContext.num_decode_requests",
        "megatron.core.inference.contexts.dynamic_block_allocator.BlockAllocator.get_active_used",
    ],
)
def test_private_names_are_where_they_were(name):
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            owner = getattr(owner, part)
        return
    raise AssertionError(f"no module in {name}")
