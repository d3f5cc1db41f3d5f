"""Bytes of parameters, gradients and optimizer state on a rank, exact by the arithmetic of megatron-core's buffers."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_r1v2.config.choices import Part
from megatron_r1v2.models.architecture import R1V2Architecture
from megatron_r1v2.planning.parameters import Layout, Parameter, stage_parameters, trained_parameters

# megatron-core 0.16.1, distributed/param_and_grad_buffer.py: alignment of parameters and buckets in a DDP buffer.
_PARAMETER_ALIGNMENT = 64
_BUCKET_ALIGNMENT = 128
_FLOAT32 = 4
# torch's Adam keeps a step count, one float32, for each parameter.
_STEP_BYTES = 4


@dataclass(frozen=True)
class ModelState:
    """Bytes that a rank holds from the start of a stage to its end."""

    parameters: int
    """Weights, with the padding of the DDP buffer of the trained ones."""
    gradients: int
    """The float32 gradient buffer of the trained weights."""
    optimizer: int
    """This data-parallel rank's share: Adam's two moments, and float32 weights beside bf16 ones."""
    shard_elements: int
    """Trained elements whose optimizer state is on this rank."""
    largest_shard: int = 0
    """Those of the parameter with the most of them."""
    largest_parameter: int = 0
    """The elements of the largest parameter, trained or not."""

    @property
    def total(self) -> int:
        """Return all bytes."""
        return self.parameters + self.gradients + self.optimizer


def model_state(
    architecture: R1V2Architecture,
    layout: Layout,
    *,
    stage: int,
    parts: Collection[Part],
    element_bytes: int,
    data_rank: int = 0,
) -> ModelState:
    """Compute the exact bytes of model, gradients and optimizer state on a rank.

    Args:
        stage: pipeline stage, from 0.
        element_bytes: 2 for bf16, 4 for fp32.
        data_rank: data-parallel rank, which decides the share of the optimizer state.
    """
    parameters = stage_parameters(architecture, layout, stage, scores=Part.score in parts)
    trained = trained_parameters(parameters, parts)
    frozen_elements = sum(parameter.numel for parameter in parameters) - sum(part.numel for part in trained)
    places, buckets = _ddp_buffer(trained, layout.data)
    buffer = buckets[-1][1] if buckets else 0
    shards = [
        elements for start, end in places if (elements := _share(start, end, buckets, data_rank, layout.data)) > 0
    ]
    owned = sum(shards)
    # Two moments, and a float32 copy of bf16 weights; fp32 weights are updated in place.
    copies = 3 if element_bytes == 2 else 2
    return ModelState(
        parameters=(frozen_elements + buffer) * element_bytes,
        gradients=buffer * _FLOAT32,
        optimizer=owned * copies * _FLOAT32 + len(shards) * _STEP_BYTES,
        shard_elements=owned,
        largest_shard=max(shards, default=0),
        largest_parameter=max(parameter.numel for parameter in parameters),
    )


@functools.lru_cache(maxsize=4096)  # the search asks for the same state with many workloads
def largest_state(
    architecture: R1V2Architecture, layout: Layout, *, stage: int, parts: tuple[Part, ...], element_bytes: int
) -> ModelState:
    """Return the state of the data-parallel rank with the most bytes."""
    # The buffer is cut into equal shares. Padding is at the end of a bucket, so one of the first shares is full; the
    # last one may be all padding.
    states = [
        model_state(architecture, layout, stage=stage, parts=parts, element_bytes=element_bytes, data_rank=rank)
        for rank in range(min(layout.data, 4))
    ]
    return max(states, key=lambda state: state.total)


def _ddp_buffer(trained: Sequence[Parameter], data: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Lay parameters into a DDP buffer: backwards, aligned, in one bucket but for tied embeddings of a pipeline.

    Returns:
        Start and end of each parameter, and of each bucket, in elements.
    """
    places: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    bucket_start = end = 0
    is_bucket_open = False
    # Backwards, so that buckets fill in the order in which the backward pass makes gradients.
    for parameter in reversed(trained):
        start = _round_up(end, _PARAMETER_ALIGNMENT)
        if parameter.own_bucket and is_bucket_open:
            start = _round_up(start, math.lcm(data, _BUCKET_ALIGNMENT))
            buckets.append((bucket_start, start))
            bucket_start = start
        end = start + parameter.numel
        places.append((start, end))
        is_bucket_open = not parameter.own_bucket
        if parameter.own_bucket:
            end = _round_up(end, math.lcm(data, _BUCKET_ALIGNMENT))
            buckets.append((bucket_start, end))
            bucket_start = end
    if is_bucket_open:
        buckets.append((bucket_start, _round_up(end, math.lcm(data, _BUCKET_ALIGNMENT))))
    return places, buckets


def _share(start: int, end: int, buckets: Sequence[tuple[int, int]], data_rank: int, data: int) -> int:
    """Return how many elements of a parameter a data-parallel rank owns: each bucket is cut into equal parts."""
    for bucket_start, bucket_end in buckets:
        if bucket_start <= start < bucket_end:
            size = (bucket_end - bucket_start) // data
            low = bucket_start + data_rank * size
            return max(0, min(end, low + size) - max(start, low))
    raise AssertionError("a parameter lies outside of all buckets")


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
