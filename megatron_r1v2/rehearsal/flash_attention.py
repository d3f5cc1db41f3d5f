"""Stand-ins with flash-attn's signatures for its paged kernels, which check what the kernels check.

flash-attn is not in the CPU environment, and is on the cluster. Without these the rehearsal would run the attention in
torch that takes its place, and count another memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_r1v2.rehearsal.watch import replace

_BLOCK_TOKENS = 256


def install(count_flops: Callable[[int], None]) -> None:
    """Put the stand-ins where megatron-core and our attention look for flash-attn.

    Args:
        count_flops: told the FLOPs of a call.
    """
    from megatron.core.transformer import attention

    from megatron_r1v2.models import paged_attention

    def varlen(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        *longest: int,
        block_table: torch.Tensor,
        **_: object,
    ) -> torch.Tensor:
        """Stand in for flash_attn_varlen_func."""
        _check(q, k, v, block_table, cu_seqlens_q)
        if q.dim() != 3 or not len(cu_seqlens_q) == len(cu_seqlens_k) == len(block_table) + 1:
            raise ValueError(
                f"flash_attn_varlen_func wants [tokens, heads, size] and one bound more than block tables, got "
                f"{list(q.shape)}, {len(cu_seqlens_q)} and {len(cu_seqlens_k)} bounds, {len(block_table)} tables"
            )
        # Two products, halved for causality only where the whole prompt is new; an upper bound.
        count_flops(4 * q.shape[0] * int(longest[1]) * q.shape[1] * q.shape[2])
        return torch.empty_like(q)

    def with_cache(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        *,
        cache_seqlens: torch.Tensor,
        block_table: torch.Tensor,
        **_: object,
    ) -> torch.Tensor:
        """Stand in for flash_attn_with_kvcache."""
        _check(q, k_cache, v_cache, block_table, cache_seqlens)
        if q.dim() != 4 or not q.shape[0] == len(cache_seqlens) == len(block_table):
            raise ValueError(
                f"flash_attn_with_kvcache wants [requests, 1, heads, size], a length and a block table for each, got "
                f"{list(q.shape)}, {len(cache_seqlens)} and {len(block_table)}"
            )
        count_flops(4 * q.shape[2] * q.shape[3] * int(cache_seqlens.sum()))
        return torch.empty_like(q)

    for module in (attention, paged_attention):
        replace(module, "flash_attn_varlen_func", varlen)
        replace(module, "is_fa_min_version", lambda *_, **__: True)
    replace(attention, "flash_attn_with_kvcache", with_cache)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> None:
    problems = [
        f"{name} is on {tensor.device}, not on the GPU"
        for name, tensor in (("q", q), ("k", k), ("v", v), ("block_table", table), ("lengths", lengths))
        if not tensor.is_cuda
    ]
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.bfloat16, torch.float16):
        problems.append(f"dtypes are {q.dtype}, {k.dtype}, {v.dtype}; accepted: bf16 or fp16, all the same")
    if table.dtype != torch.int32 or lengths.dtype != torch.int32:
        problems.append(f"block_table is {table.dtype} and lengths are {lengths.dtype}; accepted: int32")
    if k.shape[1] % _BLOCK_TOKENS:
        problems.append(f"blocks have {k.shape[1]} tokens; accepted: multiples of {_BLOCK_TOKENS}")
    if q.shape[-2] % k.shape[-2] or q.shape[-1] > 256:
        problems.append(f"{q.shape[-2]} heads of {q.shape[-1]} over {k.shape[-2]} key heads")
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        problems.append("the last dimension is not contiguous")
    if problems:
        raise ValueError(f"flash-attn would refuse: {'; '.join(problems)}")
