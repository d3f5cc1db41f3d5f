"""What a rehearsal replaces must exist: torch's and megatron-core's private names among them."""

import importlib
from types import SimpleNamespace

import pytest

from megatron_r1v2.rehearsal.replacements import original, replace


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
