"""CUDA graphs of the language model's layers for one generation phase, through megatron-core's own manager.

A decode step of a large model launches thousands of small kernels; a graph launches those of a layer at once.
megatron-core captures graphs if `cuda_graph_impl` is "local", but it gives the layers their managers for good and would
graph training too. Here the layers have managers during a generation phase only. Training is as without graphs, and no
graph remains that reads a freed cache or the weights before an update.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, initialize_rng_tracker
from megatron.core.transformer.cuda_graphs import CudaGraphManager, delete_cuda_graphs
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel.groups import ParallelContext


def check_cuda_graphs(parallel: ParallelContext) -> None:
    """Check that graphs can be captured in this layout.

    Raises:
        ValueError: the device is no GPU, or tensor-parallel ranks communicate over gloo.
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


@contextmanager
def graphed_layers(model: R1V2Model) -> Iterator[None]:
    """Let megatron-core capture and replay graphs of the decoder's layers inside the block; drop them after it.

    Args:
        model: this rank's part, in eval mode.
    """
    layers = [layer for layer in model.language.decoder.layers if isinstance(layer, TransformerLayer)]
    # The first manager switches the process to a stream of its own, on which it can capture.
    stream = torch.cuda.current_stream()
    random_states = get_cuda_rng_tracker().get_states()
    torch.cuda.synchronize()
    # A graph cannot hold the random states of training. Layers draw nothing here, so an empty tracker will do.
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    model.config.cuda_graph_impl = "local"
    try:
        for layer in layers:
            layer.cudagraph_manager = CudaGraphManager(model.config)
        yield
    finally:
        # A replay may still run, and reads what is deleted below.
        torch.cuda.synchronize()
        for layer in layers:
            # A failed capture may have left some layers without a manager.
            if hasattr(layer, "cudagraph_manager"):
                del layer.cudagraph_manager
        model.config.cuda_graph_impl = "none"
        delete_cuda_graphs()
        initialize_rng_tracker(force_reset=True)
        get_cuda_rng_tracker().set_states(random_states)
        torch.cuda.set_stream(stream)
