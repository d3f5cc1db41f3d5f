"""A torch.distributed backend for ranks that share one GPU: copies to the host, then gloo.

NCCL refuses two ranks on one device. Gloo accepts CUDA tensors in some collectives only: not in the coalesced gather of
megatron-core's distributed optimizer, nor between two pipeline stages. The copies are slow: this backend is for tests.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, Work
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

NAME = "host_staged"

# The methods of a process group in torch 2.6 and in later releases, which renamed some. Each takes the tensors that it
# fills as its first argument.
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
    """Work on host tensors, whose results go to the device when a caller waits."""

    def __init__(self, work: Work, results: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self._work = work
        self._results = results

    @override
    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        """Wait for the transfer, then copy the results from the host."""
        self._work.wait()
        # A pipeline stage receives into a leaf that requires a gradient: autograd refuses to write into it.
        with torch.no_grad():
            for target, staged in self._results:
                target.copy_(staged)
        # A second wait must not copy again: the caller may have changed the tensor since.
        self._results = []
        return True

    @override
    def is_completed(self) -> bool:
        """Return whether the transfer has ended; the results may still be on the host."""
        return self._work.is_completed()


class HostStagedGroup(dist.ProcessGroup):
    """A process group that passes host copies of its tensors to gloo."""

    def __init__(self, store: Store, rank: int, size: int, timeout: datetime.timedelta) -> None:
        """Connect to the other ranks of the group; torch.distributed calls this."""
        super().__init__(rank, size)  # type: ignore[call-arg]  # the stub lacks the constructor of subclasses
        self._on_host = dist.ProcessGroup(store, rank, size)
        self._on_host._set_default_backend(dist.ProcessGroup.BackendType.GLOO)  # noqa: SLF001
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
        self._on_host._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)  # noqa: SLF001

    @override
    def barrier(self, *args: object, **kwargs: object) -> Work:
        """Collective over this group: wait for all ranks."""
        # The options name the GPU to wait on, which gloo does not accept.
        return self._on_host.barrier()

    def getBackendName(self) -> str:  # noqa: N802
        """Return the backend's name."""
        return NAME


def _staged(name: str) -> Callable[..., Work]:
    """Make the method that runs one collective on host copies."""

    def collective(self: HostStagedGroup, filled: object, *args: object, **kwargs: object) -> Work:
        on_host = tree_map(_copy_to_host, filled)
        work = getattr(self._on_host, name)(on_host, *tree_map(_copy_to_host, args), **tree_map(_copy_to_host, kwargs))
        # A send fills nothing, and autograd would take a write to its tensor for a change in place.
        results = [] if name == "send" else list(zip(tree_leaves(filled), tree_leaves(on_host), strict=True))
        return _Transfer(work, results)

    return collective


def _copy_to_host(value: object) -> object:
    # Copy tensors of the CPU too, so that tests without a GPU go the same way.
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


for _name in _COLLECTIVES:
    setattr(HostStagedGroup, _name, _staged(_name))


def register() -> None:
    """Register the backend with torch.distributed; a second call changes nothing."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, HostStagedGroup, devices=["cpu", "cuda"])
