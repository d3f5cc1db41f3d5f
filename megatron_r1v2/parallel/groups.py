"""Process groups from the settings, and this process's place in them.

No other module queries megatron-core's parallel_state: functions take the groups that they communicate over.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.parallel import cpu, host_staged
from megatron_r1v2.parallel.store import GroupStore

_DETERMINISTIC_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "^NVLS",  # switches add in the order of arrival
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}


@dataclass(frozen=True)
class ParallelContext:
    """The place of this process in the layout, and the groups that it communicates over."""

    groups: ProcessGroupCollection
    """megatron-core's collection: tp, pp, mp (tensor + pipeline), dp, cp, embd, ..."""
    device: torch.device
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    store: GroupStore

    @property
    def is_first_stage(self) -> bool:
        """Return whether this rank holds the embedding, the vision tower and the adapter."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Return whether this rank holds the output layer."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_replica_leader(self) -> bool:
        """Return whether this is the first rank of its model replica (TP 0 of stage 0)."""
        return self.tensor_rank == 0 and self.pipeline_rank == 0

    @property
    def is_main(self) -> bool:
        """Return whether this is the rank that writes logs."""
        return self.is_replica_leader and self.data_rank == 0

    @property
    def num_processes(self) -> int:
        """Return how many processes share the work."""
        return self.tensor_size * self.pipeline_size * self.data_size

    @property
    def device_name(self) -> str:
        """Return the name of this rank's GPU, or "CPU"."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    @property
    def last_stage_rank(self) -> int:
        """Return the global rank of the last pipeline stage of this rank's pipeline."""
        return dist.get_process_group_ranks(self.groups.pp)[-1]


def reserve_gather_buffer(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Give megatron-core's buffer for gathered inputs of linears room for a shape, so that it stays in place."""
    parallel_state.get_global_memory_buffer().get_tensor(shape, dtype, "mpu")


def check_world_size(settings: ParallelConfig, world_size: int) -> None:
    """Check that the number of processes fits the layout.

    Raises:
        ValueError: tensor x pipeline does not divide `world_size`, or sequence parallelism lacks tensor parallelism.
    """
    model_size = settings.tensor * settings.pipeline
    if world_size % model_size:
        raise ValueError(
            f"parallel.tensor={settings.tensor} x parallel.pipeline={settings.pipeline} needs a multiple of "
            f"{model_size} processes, got {world_size}; start more with torchrun --nproc-per-node, or lower one of them"
        )
    if settings.sequence and settings.tensor == 1:
        raise ValueError(
            "parallel.sequence=true splits activations over tensor-parallel ranks but parallel.tensor=1; "
            "set parallel.tensor to 2 or more, or parallel.sequence=false"
        )


def use_deterministic_algorithms() -> None:
    """Let torch, cuBLAS, NCCL and TransformerEngine compute the same bits each time; call before the device is used."""
    # Each library reads its variable when it starts; one that the user has set stays.
    for name, value in _DETERMINISTIC_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Warn only: the cumulative sum that draws a token has no such kernel by torch's list, though rows of its length are
    # summed by one block each, in order.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # torch would fill fresh memory with NaN, the cache of a generation phase included.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # made by its class


def initialize(settings: ParallelConfig, *, seed: int) -> ParallelContext:
    """Collective over all ranks: start the process groups, over NCCL if each rank has its own GPU, else over gloo.

    Args:
        seed: the seed of megatron-core's random-number trackers (weight initialisation, dropout).
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    check_world_size(settings, world_size)
    cpu.install_if_needed()
    device = _device()
    if not dist.is_initialized():
        dist.init_process_group(
            backend=_backend(),
            rank=rank,
            world_size=world_size,
            # A single process needs no port, which another run on the machine might use. With None, torch connects to
            # the store of torchrun.
            store=dist.HashStore() if world_size == 1 else None,  # type: ignore[attr-defined]  # not in torch's __all__
            timeout=datetime.timedelta(minutes=settings.timeout_minutes),
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=settings.tensor,
        pipeline_model_parallel_size=settings.pipeline,
        # megatron-core accepts whole minutes only.
        distributed_timeout_minutes=max(1, int(settings.timeout_minutes)),
    )
    # One seed for all: megatron-core derives that of each tensor-parallel rank from it.
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return current_context(device)


def current_context(device: torch.device | None = None) -> ParallelContext:
    """Return the context of the process groups that `initialize` started."""
    return ParallelContext(
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        device=device or _device(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        store=GroupStore(),
    )


def make_control_group(settings: ParallelConfig) -> dist.ProcessGroup | None:
    """Collective over all ranks: make a gloo group of them for messages between CPUs; return None for a single rank.

    Args:
        settings: the time limit, which is that of the other groups.
    """
    if dist.get_world_size() == 1:
        return None
    # Gloo also where the other groups use NCCL: a message must not queue behind the kernels of a GPU.
    group: dist.ProcessGroup = dist.new_group(
        backend="gloo", timeout=datetime.timedelta(minutes=settings.timeout_minutes)
    )
    return group


def ranks_per_device() -> int:
    """Return how many ranks of this machine share a GPU, at most."""
    return -(-int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // max(1, torch.cuda.device_count()))


def shut_down() -> None:
    """Destroy the process groups."""
    # megatron-core's cache of rotary embeddings holds their groups, whose threads would outlive every run of a process.
    RotaryEmbedding.forward.cache_clear()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    # More ranks than GPUs share them; `_backend` then stages collectives through the host.
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _backend() -> str:
    if not torch.cuda.is_available():
        return "gloo"
    if ranks_per_device() == 1:
        return "nccl"
    host_staged.register()
    return host_staged.NAME
