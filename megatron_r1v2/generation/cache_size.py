"""The size of a key-value cache: what the recipe gives it, or what is free when a phase begins.

The planner decides by the same functions, from the bytes that it has for weights and training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_r1v2.config.schema import GenerationConfig
from megatron_r1v2.generation.features import TILES_PER_PASS
from megatron_r1v2.models.architecture import R1V2Architecture
from megatron_r1v2.parallel.groups import ParallelContext, ranks_per_device
from megatron_r1v2.types import NoRoomError

GIB = 1024**3
GRAPH_ROWS = 64
"""megatron-core's context pads the requests of a graph to a multiple of this."""
DRAW_BYTES = 4 + 4 + 4 + 8
"""Of each gathered logit, beside itself, while a token is drawn: two float32 copies, probabilities, float64 sums."""
GAPS = 0.03
"""Of a GPU's memory: what the allocator cannot use between tensors, and kernels' workspace."""
# A fixed number, so that a run is the same on every machine; pages that nothing is written to take no memory.
_CPU_BYTES = GIB
# Without flash-attn, attention copies the blocks of all requests, layer by layer.
_PART_WITHOUT_FLASH = 0.5


@dataclass(frozen=True)
class CacheShape:
    """The blocks of a cache on one rank."""

    block_tokens: int
    block_bytes: int
    sequence_tokens: int
    """The longest prompt and response together."""
    max_requests: int

    @property
    def sequence_blocks(self) -> int:
        """Return the blocks of the longest sequence."""
        return -(-self.sequence_tokens // self.block_tokens)

    @property
    def least_bytes(self) -> int:
        """Return the bytes with which one sequence fits."""
        return (self.sequence_blocks + 1) * self.block_bytes

    def count_blocks(self, num_bytes: int) -> int:
        """Return how many blocks fit, at most those of all requests and one that padding tokens are written to."""
        return min(num_bytes // self.block_bytes, self.max_requests * self.sequence_blocks + 1)


@dataclass(frozen=True)
class PhaseLoad:
    """The demands of a generation phase on one rank, beside its cache."""

    element_bytes: int
    tensor: int
    sequence: bool
    num_layers: int
    """Of this rank."""
    is_first_stage: bool
    is_last_stage: bool
    max_tokens_per_step: int
    max_requests: int
    prompt_tokens: int
    """Of the longest prompt."""
    prompts_in_flight: int
    """Prompts whose image embeddings are held at once, at most."""
    feature_bytes: int
    """Image features that may still be kept."""
    cuda_graphs: bool


@dataclass(frozen=True)
class Room:
    """The bytes that weights and training leave on a rank."""

    free: int
    working: int
    """The part of them that a phase takes beside its cache, at most."""

    @property
    def for_cache(self) -> int:
        """Return the bytes that are left for a cache."""
        return max(0, self.free - self.working)


def working_bytes(architecture: R1V2Architecture, load: PhaseLoad) -> int:
    """Return the bytes that a phase takes beside its cache, at most: images, and an engine step."""
    language, width = architecture.language, load.element_bytes
    tokens = max(load.max_tokens_per_step, load.max_requests)
    hidden = language.hidden_size * width
    local_hidden = hidden // (load.tensor if load.sequence else 1)
    # A layer: output, halves and product of the MLP; residual, input and norm; the input gathered from all ranks.
    step = tokens * (5 * language.ffn_size * width // load.tensor + 3 * local_hidden + hidden)
    if load.is_last_stage:
        step = max(step, load.max_requests * language.vocab_size * (width + DRAW_BYTES))
    if load.cuda_graphs:
        # Each graph keeps its layer's output.
        sizes = range(GRAPH_ROWS, load.max_requests + GRAPH_ROWS, GRAPH_ROWS)
        step += load.num_layers * sum(sizes) * local_hidden
    if not load.is_first_stage:
        return step
    embeddings = load.prompts_in_flight * load.prompt_tokens * hidden
    return max(step, _vision_bytes(architecture, load)) + embeddings + load.feature_bytes


def _vision_bytes(architecture: R1V2Architecture, load: PhaseLoad) -> int:
    """Return the bytes of a pass of the vision tower, at most."""
    vision, width = architecture.vision, load.element_bytes
    tiles = max(TILES_PER_PASS, load.prompt_tokens // architecture.tokens_per_tile)
    pixels = tiles * 3 * vision.image_size**2 * (1 + 4)  # as they are read, and in float32
    # Patches with and without class token and positions; a layer's input, norm, attention, MLP and residual.
    patches = tiles * (vision.num_patches + 1)
    of_patch = 10 * vision.hidden_size + 3 * vision.ffn_size // load.tensor
    features = tiles * architecture.tokens_per_tile * architecture.adapter_input_size
    return pixels + width * max(patches * of_patch, 2 * features)


def count_given_blocks(settings: GenerationConfig, shape: CacheShape) -> int:
    """Return the blocks of a cache of `generation.kv_cache_gib`.

    Raises:
        ValueError: it does not hold one sequence.
    """
    assert settings.kv_cache_gib != "auto"
    blocks = shape.count_blocks(int(settings.kv_cache_gib * GIB))
    if blocks <= shape.sequence_blocks:
        raise ValueError(
            f"generation.kv_cache_gib={settings.kv_cache_gib} holds {max(blocks - 1, 0)} blocks of "
            f"{shape.block_tokens} tokens, but one sequence of {shape.sequence_tokens} tokens (prompt and response) "
            f"needs {shape.sequence_blocks}; give at least {shape.least_bytes / GIB:.3g}, or lower "
            "generation.max_response_tokens"
        )
    return blocks


def agree_on_blocks(shape: CacheShape, room: Room, parallel: ParallelContext) -> int:
    """Collective over the replica: return the blocks that every rank has room for.

    Raises:
        NoRoomError: on all ranks, if one of them has no room for a sequence.
    """
    # The scheduler of each rank counts blocks: with other numbers the ranks would run other steps.
    blocks = torch.tensor([shape.count_blocks(room.for_cache)], device=parallel.device)
    dist.all_reduce(blocks, op=dist.ReduceOp.MIN, group=parallel.groups.mp)
    if int(blocks) <= shape.sequence_blocks:
        raise no_room(shape, room)
    return int(blocks)


def no_room(shape: CacheShape, room: Room) -> NoRoomError:
    """Return the error of a cache that takes what is free, where that is too little."""
    return NoRoomError(
        f"generation.kv_cache_gib=auto finds {room.free / GIB:.3g} GiB free beside weights and training, of which "
        f"images and a step may take {room.working / GIB:.3g}; one sequence of {shape.sequence_tokens} tokens (prompt "
        f"and response) needs {shape.least_bytes / GIB:.3g} on each rank of the replica. Lower "
        "generation.feature_cache_gib, generation.max_tokens_per_step, generation.max_requests or "
        "generation.max_response_tokens, raise parallel.tensor, or give a number"
    )


def measure_room(architecture: R1V2Architecture, load: PhaseLoad, device: torch.device, *, flash: bool) -> Room:
    """Return the room on this rank's device.

    Args:
        flash: whether flash-attn reads the cache in place.
    """
    if device.type == "cpu":
        return Room(_CPU_BYTES, 0)
    # What the allocator holds without need, it would hold beside the cache.
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    # Ranks that share a GPU make their caches at the same time.
    usable = (free - total * GAPS) / ranks_per_device() * (1 if flash else _PART_WITHOUT_FLASH)
    return Room(int(usable), working_bytes(architecture, load))
