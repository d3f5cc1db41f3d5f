"""The pretended device itself: what CUDA refuses is refused with the line, what it takes is taken."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.pretended_device import RefusedByCuda, is_on_device, pretended_device
from tests.ranks import run_ranks


def on_device(*size: int) -> torch.Tensor:
    return torch.ones(*size, device="cuda")


def in_backward() -> torch.Tensor:
    """Mix devices where no line of Python runs but that of the hook."""
    leaf = on_device(3).requires_grad_()
    doubled = leaf * 2
    doubled.register_hook(lambda gradient: gradient + torch.ones(3))
    return torch.autograd.backward(doubled.sum())


REFUSED: dict[str, Callable[[], object]] = {
    "sum": lambda: on_device(3) + torch.ones(3),
    "number of the device": lambda: on_device(3).sum() * torch.ones(3),
    "index_select": lambda: on_device(3).index_select(0, torch.tensor([0])),
    "embedding": lambda: torch.nn.functional.embedding(torch.tensor([0]), on_device(3, 2)),
    "gather": lambda: on_device(3).gather(0, torch.tensor([0])),
    "index of the device": lambda: torch.ones(3)[on_device(2).long()],
    "cat": lambda: torch.cat([on_device(3), torch.ones(3)]),
    "numpy": lambda: on_device(3).numpy(),
    "from numpy": lambda: on_device(3) + torch.from_numpy(torch.ones(3).numpy()),
    "view": lambda: on_device(3)[1:] + torch.ones(4)[:2],
    "moved": lambda: on_device(3) + on_device(3).cpu(),
    "in place": lambda: torch.ones(3).add_(on_device(3)),
    "backward": in_backward,
    "collective": lambda: dist.all_reduce(torch.ones(3)),
}
TAKEN: dict[str, Callable[[], torch.Tensor]] = {
    "number of the host": lambda: on_device(3) + torch.tensor(1.0),
    "index of the host": lambda: on_device(3)[torch.tensor([0, 1])],
    "mask of the host": lambda: on_device(3)[torch.tensor([True, False, True])],
    "copy": lambda: on_device(3).copy_(torch.ones(3)),
    "moved": lambda: on_device(3) + torch.ones(3).to("cuda", torch.float32),
    "moved to another": lambda: torch.ones(3).to(on_device(3)),
    "by number": lambda: torch.ones(3).to(0) + torch.ones(3).cuda(),
    "like": lambda: torch.zeros_like(on_device(3)) + on_device(3).new_ones(3),
    "by device": lambda: torch.arange(3, device=on_device(1).device),
    "module": lambda: torch.nn.Linear(2, 2).to("cuda")(on_device(1, 2)),
}


def refusals() -> dict[str, str]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    found = {}
    with pretended_device():
        assert torch.cuda.is_available()
        for name, mistake in REFUSED.items():
            try:
                mistake()
                found[name] = "taken"
            except RefusedByCuda as error:
                found[name] = str(error)
        found |= {f"{name}, taken": str(is_on_device(action())) for name, action in TAKEN.items()}
        tensor = on_device(3)
        assert (str(tensor.device), tensor.is_cuda, tensor.type()) == ("cuda:0", True, "torch.cuda.FloatTensor")
        assert str(tensor.cpu().device) == "cpu"
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    return run_ranks(1, refusals)[0]


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_refused_with_its_line(found: dict[str, str], name: str) -> None:
    assert found[name] != "taken"
    assert os.path.basename(__file__) in found[name]


@pytest.mark.parametrize("name", TAKEN)
def test_what_a_gpu_takes_is_taken_and_on_the_device(found: dict[str, str], name: str) -> None:
    assert found[f"{name}, taken"] == "True"
