"""A torch.distributed backend for ranks that share a GPU: every collective travels through the host's memory by gloo.

NCCL refuses two ranks on one device, and gloo takes CUDA tensors in some collectives only: not in the coalesced gather
of megatron-core's distributed optimizer, nor between two pipeline stages. It is slow, and meant for tests on one GPU.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Work
from torch.utils._pytree import tree_leaves, tree_map

NAME = "host_staged"

# Under the names of torch 2.6 and of later ones; each takes what it fills as its first argument.
_COLLECTIVES = (
    "_allgather_base",
    "_reduce_scatter_base",
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "broadcast",
    "gather",
    "recv",
    "recv_anysource",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
)


class _Transfer(Work):
    """Work whose result is copied to where it belongs when somebody waits for it."""

    def __init__(self, work: Work, results: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self._work = work
        self._results = results

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        """Wait, then copy from the host."""
        self._work.wait()
        with torch.no_grad():  # what a pipeline stage receives is a leaf that requires a gradient
            for target, staged in self._results:
                target.copy_(staged)
        self._results = []
        return True

    def is_completed(self) -> bool:
        """Return whether there is nothing to wait for."""
        return self._work.is_completed()


class HostStagedGroup(dist.ProcessGroup):
    """A process group that hands copies on the CPU to gloo."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> None:
        """Connect to the other ranks; called by torch.distributed.

        Args:
            store: where ranks meet.
            rank: in this group.
            size: ranks of this group.
            timeout: of a collective.
        """
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._on_host = dist.ProcessGroup(store, rank, size)
        self._on_host._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
        self._on_host._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)

    def barrier(self, *args: Any, **kwargs: Any) -> Work:
        """Wait for all ranks; without the options, which name a device."""
        return self._on_host.barrier()

    def getBackendName(self) -> str:
        """Return the backend's name."""
        return NAME


def _staged(name: str) -> Callable[..., Work]:
    def collective(self: HostStagedGroup, filled: Any, *args: Any, **kwargs: Any) -> Work:
        on_host = tree_map(_copy_to_host, filled)
        work = getattr(self._on_host, name)(on_host, *tree_map(_copy_to_host, args), **tree_map(_copy_to_host, kwargs))
        results = [] if name == "send" else list(zip(tree_leaves(filled), tree_leaves(on_host), strict=True))
        return _Transfer(work, results)

    return collective


def _copy_to_host(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


for _name in _COLLECTIVES:
    setattr(HostStagedGroup, _name, _staged(_name))


def register() -> None:
    """Make the backend known to torch.distributed; a second call changes nothing."""
    if NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(NAME, HostStagedGroup, devices=["cpu", "cuda"])
