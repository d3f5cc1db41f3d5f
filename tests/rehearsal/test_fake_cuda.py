"""A GPU by name, in a process of its own: what C++ would decide by the device is decided in Python."""

import json
import subprocess
import sys

import pytest

_START = """
import json, sys, traceback, torch, torch.nn.functional as F
from megatron_r1v2.rehearsal import fake_cuda
from megatron_r1v2.rehearsal.fake_tensors import FakeTensors
fake_cuda.install(gpus_per_node=8, memory_bytes=2**30)
fake_cuda.install_for_fakes()
cuda = torch.device("cuda", 0)
failures = {}
for name, case in json.loads(sys.argv[1]).items():
    with FakeTensors("cuda", hides_device=True) as mode, mode.phase("test"):
        try:
            exec(case)
            failures[name] = ""
        except Exception:
            failures[name] = traceback.format_exc()
print(json.dumps(failures))
"""
_CASES = {
    "torch says that it has GPUs": "assert torch.cuda.is_available() and torch.cuda.device_count() == 8",
    "factories": """
for made in (torch.empty(3, device="cuda"), torch.zeros(3, device=0), torch.tensor([1], device="cuda"),
             torch.as_tensor([1.0], device=cuda), torch.ones(2).cuda(), torch.ones(2).to(cuda, torch.float16)):
    assert made.device == cuda and made.is_cuda and "cuda" in made.type(), made
assert torch.zeros_like(torch.empty(3, device=cuda)).device == cuda
""",
    "free memory": """
before, total = torch.cuda.mem_get_info()
held = torch.empty(2**20, device=cuda)
assert total == 2**30 and before - torch.cuda.mem_get_info()[0] == 4 * 2**20
assert 2**30 < before < 1.05 * 2**30, "what is asked for is without the gaps, which the cache takes off"
assert [rule.partition(":")[0] for rule, _ in mode.questions] == ["free memory of a GPU"]
""",
    "values travel": """
there = torch.tensor([1, 2, 3]).cuda()
assert there.tolist() == [1, 2, 3] and there.cpu().device.type == "cpu" and there.cpu().tolist() == [1, 2, 3]
assert torch.tensor([there[0], there[2]]).tolist() == [1, 3]
""",
    "gradients": """
weight = torch.empty(4, 4, device=cuda, requires_grad=True)
(weight @ weight).sum().backward()
assert weight.grad.device == cuda
""",
    "the gradient of SiLU is one kernel": """
inputs = torch.empty(1000, 1000, device=cuda, requires_grad=True)
outputs, gradient = F.silu(inputs), torch.empty(1000, 1000, device=cuda)
with mode.phase("backward"):
    outputs.backward(gradient)
backward = mode.ledger.phases[-1]
assert backward.peak - backward.held_before == inputs.nbytes == inputs.grad.nbytes, backward
""",
    "mixing devices": """
try:
    torch.ones(2).cuda() + torch.ones(2)
except RuntimeError as error:
    assert "same device" in str(error)
else:
    raise AssertionError("nothing was said")
""",
    "mixing devices where torch's fakes do not look": """
there, here = torch.ones(3, device=cuda), torch.ones(3)
for mix in (lambda: here[there.long()], lambda: here[there > 0], lambda: here.index_put((there.long(),), here),
            lambda: here.index_put_((there > 0,), here), lambda: torch.ones(100_000)[there.long()],
            lambda: there.masked_select(here > 0), lambda: torch.equal(there, here),
            lambda: there.index_put((here.long(),), here)):
    try:
        mix()
    except RuntimeError as error:
        assert "device" in str(error), error
    else:
        raise AssertionError("nothing was said")
# Indices and numbers of the host are taken.
there[here.long()], there[here > 0], there.index_put_((here.long(),), torch.tensor(2.0)), torch.equal(there, there)
""",
    "a tensor of the host in a collective": """
from megatron_r1v2.rehearsal.cluster import Place, install_fake_groups
import torch.distributed as dist
Place(0, 8, 8).enter()
install_fake_groups(mode)
dist.init_process_group(rank=0, world_size=8)
gpus, hosts = dist.new_group([0, 1]), dist.new_group([0, 1], backend="gloo")
there, here = torch.ones(3, device=cuda), torch.ones(3)
for send in (lambda: dist.all_reduce(here), lambda: dist.broadcast(here, 0, group=gpus),
             lambda: dist.send(here, 1), lambda: dist.all_gather([there, here], there, group=gpus)):
    try:
        send()
    except RuntimeError as error:
        assert "of a tensor of the host (float32 [3]) in a group of" in str(error), error
    else:
        raise AssertionError("nothing was said")
dist.all_reduce(there), dist.all_reduce(here, group=hosts), dist.barrier(), dist.barrier(group=hosts)
""",
    "the flash kernel": """
q = torch.empty(1, 4, 8, 16, device=cuda, dtype=torch.bfloat16, requires_grad=True)
k = torch.empty(1, 2, 8, 16, device=cuda, dtype=torch.bfloat16)
out = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
assert "Flash" in type(out.grad_fn).__name__ and out.device == cuda
""",
    "modules move and are copied": """
import copy
module = torch.nn.Linear(2, 2).to(device=cuda, dtype=torch.bfloat16)
assert module.weight.device == cuda and module.weight.dtype is torch.bfloat16
assert copy.deepcopy(module.weight).device == cuda
""",
    "unknown lists": "assert torch.empty(100_000, device=cuda).reshape(-1, 10)[0].tolist() == [1.0] * 10",
}


@pytest.fixture(scope="module")
def failures():
    """Run all cases in one process, which is not to be used for anything else, and return what failed in which."""
    result = subprocess.run(
        [sys.executable, "-c", _START, json.dumps(_CASES)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", _CASES)
def test_it_behaves_as_a_gpu(failures, name):
    assert not failures[name]
