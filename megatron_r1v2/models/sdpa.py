"""torch's scaled dot product attention with the kernel chosen here.

On a GPU torch would choose by version and shape, and may take cuDNN, whose plans are made for each length, or the one
that keeps all scores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn import attention
from torch.nn.attention import SDPBackend


def attend(
    query_BNSD: torch.Tensor,
    key_BNSD: torch.Tensor,
    value_BNSD: torch.Tensor,
    *,
    scale: float | None,
    is_causal: bool = False,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute softmax(q k^T * scale) v; key and value may have fewer heads.

    Args:
        scale: None: 1 / sqrt(D).
        mask: true where a query sees a key.

    Returns:
        [B, N, S, D].

    Raises:
        ValueError: no kernel that keeps memory linear takes the shape on a GPU.
    """
    is_grouped = query_BNSD.shape[1] != key_BNSD.shape[1]
    if not query_BNSD.is_cuda:
        return F.scaled_dot_product_attention(
            query_BNSD, key_BNSD, value_BNSD, mask, is_causal=is_causal, scale=scale, enable_gqa=is_grouped
        )
    kernel = choose_kernel(query_BNSD.dtype, has_mask=mask is not None)
    if is_grouped and kernel is SDPBackend.EFFICIENT_ATTENTION:
        # It knows no groups of heads.
        key_BNSD, value_BNSD = (repeat_heads(tensor, query_BNSD.shape[1]) for tensor in (key_BNSD, value_BNSD))
        is_grouped = False
    try:
        with attention.sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(
                query_BNSD, key_BNSD, value_BNSD, mask, is_causal=is_causal, scale=scale, enable_gqa=is_grouped
            )
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        raise ValueError(
            f"torch {torch.__version__} has no {kernel.name} kernel on {torch.cuda.get_device_name()} for queries of "
            f"{list(query_BNSD.shape)} and keys of {list(key_BNSD.shape)} in {query_BNSD.dtype}; its warnings say why. "
            "Use a GPU of Ampere or later and heads of at most 256 channels, or model.precision=fp32"
        ) from error


def choose_kernel(dtype: torch.dtype, *, has_mask: bool) -> SDPBackend:
    """Return the kernel for a GPU."""
    # flash has neither float32 nor masks.
    is_flash = dtype in (torch.bfloat16, torch.float16) and not has_mask
    return SDPBackend.FLASH_ATTENTION if is_flash else SDPBackend.EFFICIENT_ATTENTION


def repeat_heads(tensor_BNSD: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the heads of keys or values, each as often as query heads share it."""
    return tensor_BNSD.repeat_interleave(heads // tensor_BNSD.shape[1], dim=1)
