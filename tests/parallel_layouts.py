"""Several parallel layouts in the same processes, one after the other: that saves their start."""

from __future__ import annotations

import gc

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.parallel import groups
from megatron_r1v2.parallel.groups import ParallelContext


def start_layout(parallel: ParallelConfig, *, seed: int = 1) -> ParallelContext:
    """Collective over all ranks: set up a layout and seed it; groups of the same sizes go on, others end."""
    if _sizes() != (parallel.tensor, parallel.pipeline):
        if dist.is_initialized():
            _end_groups()
        return groups.initialize(parallel, seed=seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return groups.current_context()


def _sizes() -> tuple[int, int] | None:
    if not dist.is_initialized() or not parallel_state.model_parallel_is_initialized():
        return None
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )


def _end_groups() -> None:
    """Destroy all groups but the world's: each has three threads, which would poll to the end of the process."""
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group != dist.group.WORLD:
            dist.destroy_process_group(group)
    del group
    gc.collect()
