"""CUDA graphs of the language model's layers for one generation phase, through megatron-core's own manager.

A decode step of a large model launches thousands of small kernels; a graph launches those of a layer at once.
megatron-core captures graphs if `cuda_graph_impl` is "local", but it gives the layers their managers for good and would
graph training too. Here the layers have managers during a generation phase only. Training is as without graphs, and no
graph remains that reads a freed cache or the weights before an update.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, initialize_rng_tracker
from megatron.core.transformer.cuda_graphs import CudaGraphManager, delete_cuda_graphs
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_r1v2.models.paged_attention import is_flash_attention_usable
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel.groups import ParallelContext, reserve_gather_buffer


def decide_cuda_graphs(wanted: bool | Literal["auto"], config: TransformerConfig, parallel: ParallelContext) -> str:
    """Return the reason why decode goes without graphs; empty: it replays them.

    Args:
        wanted: `generation.cuda_graphs`.

    Raises:
        ValueError: they are wanted in so many words, and cannot be captured here.
    """
    if wanted is False:
        return "generation.cuda_graphs=false"
    if wanted is True:
        check_cuda_graphs(parallel)
        return ""
    if parallel.device.type != "cuda":
        return "there is no CUDA device"
    backend = dist.get_backend(parallel.groups.tp)
    if parallel.tensor_size > 1 and backend != "nccl":
        return f"tensor-parallel ranks talk over {backend}, whose collectives cannot be captured"
    if config.fp8 and config.fp8_recipe == "blockwise":
        return "blockwise FP8 needs more padding than megatron-core's graphs have"
    if not is_flash_attention_usable(config.params_dtype):
        return "without flash-attn a graph attends over the longest sequence there may be"
    segments = _moving_segments()
    return f"{segments} without NCCL_GRAPH_REGISTER=0" if segments else ""


def check_cuda_graphs(parallel: ParallelContext) -> None:
    """Check that graphs can be captured in this layout.

    Raises:
        ValueError: the device is no GPU, tensor-parallel ranks communicate over gloo, or its memory may move.
    """
    if parallel.device.type != "cuda":
        raise ValueError(
            "generation.cuda_graphs=true needs a CUDA device and there is none; set generation.cuda_graphs=false"
        )
    backend = dist.get_backend(parallel.groups.tp)
    if parallel.tensor_size > 1 and backend != "nccl":
        raise ValueError(
            f"generation.cuda_graphs=true with parallel.tensor={parallel.tensor_size} needs NCCL, whose collectives "
            f"can be captured, but the ranks talk over {backend}; give each rank a GPU, or set "
            "generation.cuda_graphs=false"
        )
    if segments := _moving_segments():
        raise ValueError(
            f"generation.cuda_graphs=true with {segments}: set NCCL_GRAPH_REGISTER=0 too, without which replays read "
            "memory that has moved, or set generation.cuda_graphs=false"
        )


# torch 2.9 renamed the second to the first. Both count, and megatron-core's manager looks at the second only.
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_SEGMENTS = "expandable_segments:True"


def _moving_segments() -> str:
    """Return the allocator's setting with which graphs would read memory that has moved; empty: it does not."""
    names = [name for name in _ALLOCATOR_VARIABLES if _SEGMENTS in os.environ.get(name, "")]
    # megatron-core's manager lets it pass on GPUs from Blackwell on.
    if not names or os.environ.get("NCCL_GRAPH_REGISTER") == "0" or torch.cuda.get_device_capability()[0] >= 10:
        return ""
    return f"{names[0]}={_SEGMENTS}"


@contextmanager
def graphed_layers(model: R1V2Model, max_tokens: int) -> Iterator[None]:
    """Let megatron-core capture and replay graphs of the decoder's layers inside the block; drop them after it.

    Args:
        model: this rank's part, in eval mode.
        max_tokens: the most of an engine step.
    """
    layers = [layer for layer in model.language.decoder.layers if isinstance(layer, TransformerLayer)]
    config = model.config
    if config.sequence_parallel:
        # The local layers gather the tokens of all ranks into one buffer of megatron-core, which a longer step would
        # replace: graphs would go on writing where it was.
        reserve_gather_buffer((max_tokens, 1, config.hidden_size), config.params_dtype)
    # The first manager switches the process to a stream of its own, on which it can capture.
    stream = torch.cuda.current_stream()
    random_states = get_cuda_rng_tracker().get_states()
    torch.cuda.synchronize()
    # A graph cannot hold the random states of training. Layers draw nothing here, so an empty tracker will do.
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    config.cuda_graph_impl = "local"
    try:
        for layer in layers:
            layer.cudagraph_manager = CudaGraphManager(config)
        yield
    finally:
        # A replay may still run, and reads what is deleted below.
        torch.cuda.synchronize()
        for layer in layers:
            # A failed capture may have left some layers without a manager.
            if hasattr(layer, "cudagraph_manager"):
                del layer.cudagraph_manager
        config.cuda_graph_impl = "none"
        delete_cuda_graphs()
        initialize_rng_tracker(force_reset=True)
        get_cuda_rng_tracker().set_states(random_states)
        torch.cuda.set_stream(stream)
