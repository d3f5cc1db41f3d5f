"""megatron-core's inference context: the paged cache of a generation phase and the padding of its steps."""

from __future__ import annotations

import numpy
import torch
import torch.distributed as dist
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.transformer.transformer_config import TransformerConfig
from typing_extensions import override

from megatron_r1v2.config.schema import GenerationConfig
from megatron_r1v2.generation.blocks import SharedBlockAllocator
from megatron_r1v2.generation.cache_size import (
    GIB,
    CacheShape,
    PhaseLoad,
    agree_on_blocks,
    count_given_blocks,
    measure_room,
)
from megatron_r1v2.models.decode_plan import DecodePlan, plan_decode
from megatron_r1v2.models.paged_attention import is_flash_attention_usable
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel.groups import ParallelContext

# flash-attn requires blocks of 256 tokens; the attention in torch copies whole blocks, so small ones save work.
_BLOCK_TOKENS_FLASH = 256
_BLOCK_TOKENS_TORCH = 64


class UnpaddedContext(DynamicInferenceContext):
    """A context that pads a step only as far as sequence parallelism must divide it: one request decodes alone.

    What all layers of a step need alike is computed once: the rotation of their tokens, and on a CPU how decoding
    requests read the cache.
    """

    # megatron-core rounds it up to the tensor-parallel ranks.
    TOKEN_ROUNDER = 1
    decode_plan: DecodePlan | None = None
    """None while nothing decodes, and on devices other than the CPU, whose numbers the host would wait for."""
    _rotation: tuple[torch.Tensor, torch.Tensor] | None = None

    @override
    def initialize_attention_state(self, **kwargs: object) -> None:
        super().initialize_attention_state(**kwargs)
        self._rotation = None
        self.decode_plan = self._plan_decode() if self.memory_buffer.device.type == "cpu" else None

    def _plan_decode(self) -> DecodePlan | None:
        active = slice(self.paused_request_count, self.total_request_count)
        is_decoding = self.request_query_lengths[active] == 1
        if not is_decoding.any():
            return None
        lengths = self.get_active_sequence_lengths()[is_decoding].tolist()
        tables = self.request_to_kv_block_ids[active][is_decoding].tolist()
        return plan_decode(tables, lengths, self.block_size_tokens, self.params_dtype)

    @override
    def append_key_value_cache(self, layer_number: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write the keys and values of a step, [tokens, 1, heads, D]."""
        if self.memory_buffer.device.type != "cpu":
            super().append_key_value_cache(layer_number, key, value)
            return
        # megatron-core takes its Triton kernel wherever Triton is installed, which comes with torch from PyPI.
        count = self.padded_active_token_count
        places = self.token_to_block_idx[:count], self.token_to_local_position_within_kv_block[:count]
        for cache, states in zip(self.memory_buffer, (key, value), strict=True):
            cache[self.layer_map[layer_number - 1]][places] = states.squeeze(1)[:count]

    @override
    def apply_rotary_emb_query(
        self,
        query: torch.Tensor,
        query_emb: torch.Tensor,
        config: TransformerConfig,
        cu_seqlens_q: torch.Tensor,
        cp_group: dist.ProcessGroup,
        mscale: float = 1.0,
    ) -> torch.Tensor:
        return self._rotate(query, query_emb, config, mscale)

    @override
    def apply_rotary_emb_key(
        self,
        key: torch.Tensor,
        key_emb: torch.Tensor,
        config: TransformerConfig,
        cp_group: dist.ProcessGroup,
        mscale: float = 1.0,
    ) -> torch.Tensor:
        return self._rotate(key, key_emb, config, mscale)

    def _rotate(
        self, states: torch.Tensor, angles: torch.Tensor, config: TransformerConfig, mscale: float
    ) -> torch.Tensor:
        """Rotate the rows of a step, [tokens, 1, heads, D], by the angles of their positions, [positions, 1, 1, D]."""
        assert not config.rotary_interleaved, "no model of this project interleaves the halves"
        if self._rotation is None:
            # megatron-core takes the cosines again in each layer, for queries and for keys.
            own = angles[self.token_to_position_in_request[: self.padded_active_token_count]]
            cos, sin = torch.cos(own) * mscale, torch.sin(own) * mscale
            first, second = sin.chunk(2, dim=-1)
            self._rotation = cos.to(states.dtype), torch.cat((-first, second), dim=-1).to(states.dtype)
        cos, signed_sin = self._rotation
        # The halves change places; the sign that the second one gets on the way is in the sines.
        return (states * cos).add_(states.roll(states.shape[-1] // 2, dims=-1).mul_(signed_sin))


class BlockwiseContext(DynamicInferenceContext):
    """A context that pads a step to whole blocks of 128 tokens on each of up to 8 sequence-parallel ranks."""

    TOKEN_ROUNDER = 1024


def context_kind(config: TransformerConfig, *, cuda_graphs: bool) -> type[DynamicInferenceContext]:
    """Return the class of the context, which decides the padding of a step."""
    # Steps are padded here, so that the products in FP8 get the shapes they need. The alternative, megatron-core's
    # `prepare_model_for_fp8_inference`, replaces the forward of the linears for good, also in training.
    if config.fp8 and config.fp8_recipe == "blockwise":
        return BlockwiseContext
    # megatron-core's own class pads to 64 tokens: the 8 that a tensorwise product needs, on up to 8 sequence-parallel
    # ranks. Its graphs accept this class only, and it captures one for every 64 requests.
    return DynamicInferenceContext if config.fp8 or cuda_graphs else UnpaddedContext


def make_context(
    model: R1V2Model,
    parallel: ParallelContext,
    settings: GenerationConfig,
    load: PhaseLoad,
    max_sequence_tokens: int,
) -> DynamicInferenceContext:
    """Collective over the replica: allocate the cache of a phase.

    Args:
        load: the demands of the phase beside the cache.
        max_sequence_tokens: the longest prompt and response together.

    Raises:
        ValueError: the cache has no room for one sequence.
    """
    config = model.config
    flash = is_flash_attention_usable(config.params_dtype)
    block_tokens = _BLOCK_TOKENS_FLASH if flash else _BLOCK_TOKENS_TORCH
    # With more ranks than key heads, each rank has one: megatron-core repeats them.
    kv_heads = max(config.num_query_groups, parallel.tensor_size)
    head_bytes = 2 * config.kv_channels * config.params_dtype.itemsize
    block_bytes = load.num_layers * block_tokens * kv_heads // parallel.tensor_size * head_bytes
    shape = CacheShape(block_tokens, block_bytes, max_sequence_tokens, settings.max_requests)
    # Sequence parallelism splits the tokens of a step, so their limit must be a multiple of the class's padding. The
    # limit of requests must be too: it caps the padded tokens of a step that only decodes.
    kind = context_kind(config, cuda_graphs=load.cuda_graphs)
    max_requests = kind.round_up_tokens(settings.max_requests, parallel.tensor_size)
    max_tokens = kind.round_up_tokens(settings.max_tokens_per_step, parallel.tensor_size)
    if settings.kv_cache_gib == "auto":
        room = measure_room(model.architecture, load, parallel.device, flash=flash)
        blocks = agree_on_blocks(shape, room, parallel)
    else:
        blocks = count_given_blocks(settings, shape)
    context = kind(
        params_dtype=config.params_dtype,
        num_layers=load.num_layers,
        kv_channels=config.kv_channels,
        num_attention_heads=kv_heads,
        max_sequence_length=shape.sequence_blocks * block_tokens,
        # megatron-core divides by the block size again; half a block more keeps rounding from losing one.
        buffer_size_gb=(blocks + 0.5) * block_bytes / GIB,
        max_requests=max_requests,
        # A prompt in chunks has a token in the step already when the next chunk is scheduled: 1 would never do.
        max_tokens=max(max_tokens, max_requests, 2),
        block_size_tokens=block_tokens,
        pg_collection=parallel.groups,
        # One graph for each padded number of requests.
        num_cuda_graphs=max_requests // kind.round_up_tokens(1, parallel.tensor_size) if load.cuda_graphs else None,
        use_cuda_graphs_for_non_decode_steps=False,
    )
    context.block_allocator = SharedBlockAllocator(context)
    # Fresh memory may hold NaN. A masked position spreads it in torch (see paged_attention), and flash-attn does not
    # promise that it would not.
    if parallel.device.type == "cpu":
        context.memory_buffer = lazy_zeros(context.memory_buffer)
    else:
        context.memory_buffer.zero_()
    return context


def lazy_zeros(like: torch.Tensor) -> torch.Tensor:
    """Return zeros on the CPU whose pages take no memory, and no time, before something is written to them."""
    # torch writes its zeros, numpy leaves them to the system. The gate and short phases use little of a cache.
    zeros: torch.Tensor = torch.from_numpy(numpy.zeros(like.numel() * like.element_size(), dtype=numpy.uint8))
    return zeros.view(like.dtype).view(like.shape)
