"""Attention over megatron-core's paged key-value cache in plain torch, where flash-attn is not installed.

The cache is divided into blocks; a request owns the blocks in its row of the block table. Prefilling requests attend to
a copy: `_gather` puts their blocks into one padded batch. Decoding ones read the blocks in place on a CPU, where a copy
costs as much as the attention: see decode_plan.py. No loop runs over requests. Lengths: R requests, L the longest
sequence in the cache, Q the longest query.

The cache must hold finite numbers everywhere: a masked position has weight 0, and 0 x NaN is NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.transformer.attention import HAVE_FA3, flash_attn_varlen_func
from megatron.core.utils import is_fa_min_version

from megatron_r1v2.models.decode_plan import DecodePlan, attend_in_place
from megatron_r1v2.models.sdpa import attend


def is_flash_attention_usable(dtype: torch.dtype) -> bool:
    """Return whether megatron-core can use flash-attn (FA3, or FA2 from 2.7.3) for a cache of this dtype."""
    is_installed = HAVE_FA3 or (flash_attn_varlen_func is not None and is_fa_min_version("2.7.3"))
    # flash-attn has no kernels for fp32.
    return is_installed and dtype in (torch.bfloat16, torch.float16)


class BlockTable(NamedTuple):
    """The blocks of each request in a step."""

    block_ids: torch.Tensor
    """int32 [R, blocks of a request], -1 past the last block."""
    plan: DecodePlan | None = None
    """The plan by which decoding requests read them in place; None: they attend to a copy."""


class TorchAttentionContext:
    """An inference context that megatron-core's Attention.forward accepts without flash-attn.

    Attention.forward refuses dynamic batching without flash-attn before it calls `flash_decode_and_prefill`, which we
    override. That check is the only call of `is_dynamic_batching` in attention; everything else goes to the context.
    """

    def __init__(self, context: BaseInferenceContext) -> None:
        self._context = context

    def __getattr__(self, name: str) -> object:
        value: object = getattr(self._context, name)
        return value

    def key_value_cache(self, layer_number: int) -> tuple[torch.Tensor, torch.Tensor, BlockTable]:
        """Return keys and values of a layer, and the block table with the plan of the step."""
        # megatron-core hands the table through to `flash_decode_and_prefill`, which gets nothing else from the context.
        keys, values, block_ids = self._context.key_value_cache(layer_number)
        return keys, values, BlockTable(block_ids, getattr(self._context, "decode_plan", None))

    def is_dynamic_batching(self) -> bool:
        """Return False, so that megatron-core does not ask for flash-attn."""
        return False


def flash_decode_and_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    cu_seqlens_q: torch.Tensor,
    seqlens_k: torch.Tensor,
    block_table: BlockTable,
    is_decode_only: bool,
    *,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Attend causally from the newest tokens of each request to all its tokens in the cache.

    Args:
        q: [tokens, 1, heads, D]: the queries of all requests, concatenated, then padding.
        k: [blocks, block size, kv heads, D]: the cache of this layer, including the new tokens; as is `v`.
        max_seqlen_q: Q.
        max_seqlen_k: L, in tokens.
        cu_seqlens_q: int32 [R + 1]: the start of each request's queries.
        seqlens_k: int32 [R]: the tokens of each request in the cache; 0 for a padding request.
        is_decode_only: whether every request has one query, so that q has R rows.
        softmax_scale: the factor of the scores; None: 1 / sqrt(D).

    Returns:
        [tokens, 1, heads, D], zero for padding tokens.
    """
    queries, plan = q.squeeze(1), block_table.plan
    if is_decode_only and plan is not None:
        out = attend_in_place(queries[: plan.num_requests], k, v, plan, softmax_scale)
        if padding := len(queries) - plan.num_requests:
            out = F.pad(out, (0, 0, 0, 0, 0, padding))
        return out.unsqueeze(1)
    # Only as many blocks as the longest sequence has. Missing blocks (-1) become block 0, which the mask hides.
    table = block_table.block_ids[:, : -(-max_seqlen_k // k.shape[1])].clamp(min=0).long()
    out = torch.zeros_like(queries)
    if is_decode_only:
        # Where megatron-core pads the requests (FP8), a last long one would be computed many times: leave the padding
        # out. A CUDA graph cannot, since its shapes are fixed.
        if is_capturing(q):
            return _decode(queries, k, v, seqlens_k, table, max_seqlen_k, softmax_scale).unsqueeze(1)
        active = seqlens_k.nonzero(as_tuple=True)[0]
        out[active] = _decode(queries[active], k, v, seqlens_k[active], table[active], max_seqlen_k, softmax_scale)
        return out.unsqueeze(1)
    starts = cu_seqlens_q[:-1].long()
    lengths = cu_seqlens_q.diff().long()
    decoding = (lengths == 1).nonzero(as_tuple=True)[0]
    if len(decoding):
        tokens = starts[decoding]
        if plan is not None:
            out[tokens] = attend_in_place(queries[tokens], k, v, plan, softmax_scale)
        else:
            rows = (seqlens_k[decoding], table[decoding], max_seqlen_k, softmax_scale)
            out[tokens] = _decode(queries[tokens], k, v, *rows)
    prefilling = (lengths > 1).nonzero(as_tuple=True)[0]
    if len(prefilling):
        starts, lengths, table = starts[prefilling], lengths[prefilling], table[prefilling]
        steps = torch.arange(max_seqlen_q, device=q.device)
        is_query_RQ = steps < lengths[:, None]
        # Shorter requests read past their end, possibly past the end of q; `is_query_RQ` drops these rows below.
        index_RQ = (starts[:, None] + steps).clamp(max=len(queries) - 1)
        last_key_RQ = (seqlens_k[prefilling] - lengths)[:, None] + steps
        attended = _prefill(queries[index_RQ], k, v, last_key_RQ, table, max_seqlen_k, softmax_scale)
        out[index_RQ[is_query_RQ]] = attended[is_query_RQ]
    return out.unsqueeze(1)


def is_capturing(tensor: torch.Tensor) -> bool:
    """Return whether a CUDA graph is being captured, with the device of a tensor."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _decode(
    query_RND: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seqlens_k: torch.Tensor,
    table: torch.Tensor,
    length: int,
    scale: float | None,
) -> torch.Tensor:
    """Attend with one query for each request."""
    requests, heads, size = query_RND.shape
    # The query heads that share a key head become the queries of that head, so no key has to be repeated.
    grouped = query_RND.view(requests, k.shape[2], heads // k.shape[2], size)
    mask = torch.arange(length, device=k.device) < seqlens_k[:, None]
    keys, values = _gather(k, table, length), _gather(v, table, length)
    out = attend(grouped, keys, values, mask=mask[:, None, None, :], scale=scale)
    return out.reshape(requests, heads, size)


def _prefill(
    query_RQND: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    last_key_RQ: torch.Tensor,
    table: torch.Tensor,
    length: int,
    scale: float | None,
) -> torch.Tensor:
    """Attend with several queries for each request, each to the keys up to its own position."""
    mask = torch.arange(length, device=k.device) <= last_key_RQ[:, :, None]
    keys, values = _gather(k, table, length), _gather(v, table, length)
    out = attend(query_RQND.transpose(1, 2), keys, values, mask=mask[:, None], scale=scale)
    return out.transpose(1, 2)


def _gather(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """Return [R, kv heads, length, D]: the blocks of each request, concatenated."""
    # Blocks as rows of one matrix: index_select copies whole rows, twice as fast as indexing a 4-D tensor.
    rows = cache.flatten(1).index_select(0, table.flatten())
    return rows.view(table.shape[0], -1, *cache.shape[2:])[:, :length].transpose(1, 2)
