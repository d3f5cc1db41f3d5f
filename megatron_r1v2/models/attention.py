"""Attention of the local layers: torch's scaled_dot_product_attention in megatron-core's SelfAttention.

megatron-core's own DotProductAttention needs memory quadratic in the sequence length, and knows no packed rows.
"""

from __future__ import annotations

import itertools
import math

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from typing_extensions import override

from megatron_r1v2.models import paged_attention
from megatron_r1v2.models.paged_attention import BlockTable
from megatron_r1v2.models.sdpa import attend
from megatron_r1v2.models.shared_attention import PackedRowParams, RowParams, SharedRowAttention


class SDPACoreAttention(MegatronModule):
    """Causal, full or packed attention in memory linear in the sequence length.

    Rows are padded on the right, so a causal query never sees padding, and no mask is needed.
    """

    # The arguments are those that megatron-core's SelfAttention builds its core attention with.
    @override
    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Compute softmax(q k^T * scale) v.

        Args:
            query: [S, B, heads, D], or [tokens, heads, D] when packed.
            key: [S, B, kv heads, D], or [tokens, kv heads, D]; as is `value`.
            attention_mask: must be None; the mask type decides.
            attn_mask_type: causal or no_mask; None: the mask type of the layer.
            attention_bias: must be None.

        Returns:
            [S, B, heads * D], or [tokens, heads, D] when packed.
        """
        assert attention_mask is None, "pad on the right and pass no mask"
        assert attention_bias is None, "attention bias is not used by this model"
        causal = (attn_mask_type or self.attn_mask_type) in (AttnMaskType.causal, AttnMaskType.padding_causal)
        if packed_seq_params is not None:
            assert isinstance(packed_seq_params, PackedRowParams), "bounds must not be read from the device"
            return self._packed(query, key, value, packed_seq_params.bounds, causal)
        out_BNSD = self._attend(query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), causal)
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)

    def _packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: tuple[int, ...], causal: bool
    ) -> torch.Tensor:
        """Attend within each sequence of a packed row."""
        outputs = []
        # A row packs a few long sequences, so the loop costs less than the padding of a batch would.
        for start, end in itertools.pairwise(bounds):
            q_1NSD, k_1NSD, v_1NSD = (t[start:end].transpose(0, 1).unsqueeze(0) for t in (query, key, value))
            outputs.append(self._attend(q_1NSD, k_1NSD, v_1NSD, causal).squeeze(0).transpose(0, 1))
        if bounds[-1] < query.shape[0]:
            # Padding at the end of the row: any finite value will do, since its loss weight is 0.
            outputs.append(torch.zeros_like(query[bounds[-1] :]))
        return torch.cat(outputs)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:
        return attend(query, key, value, scale=self.softmax_scale, is_causal=causal)


class SharedRowSDPA(SharedRowAttention, SDPACoreAttention):
    """The core attention of the local layers of the language model."""


class PagedSelfAttention(SelfAttention):
    """megatron-core's SelfAttention with shared and packed rows, and with paged attention that needs no flash-attn.

    It uses flash-attn wherever that is installed, without a setting.
    """

    @override
    def forward(
        self,
        *args: object,
        inference_context: BaseInferenceContext | None = None,
        rotary_pos_emb: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; see the base class for the arguments."""
        if isinstance(packed_seq_params, RowParams):
            # GPTModel gives the frequencies of 0, 1, 2, ... and does not read position ids.
            assert rotary_pos_emb is not None
            assert packed_seq_params.positions_S is not None
            rotary_pos_emb = rotary_pos_emb.index_select(0, packed_seq_params.positions_S)
        if inference_context is not None and not paged_attention.is_flash_attention_usable(self.config.params_dtype):
            inference_context = paged_attention.TorchAttentionContext(inference_context)
        output: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
            *args,
            inference_context=inference_context,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )
        return output

    @override
    def flash_decode_and_prefill(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        seqlens_k: torch.Tensor,
        block_table: torch.Tensor | BlockTable,
        is_decode_only: bool,
    ) -> torch.Tensor:
        """Attend over the paged key-value cache; see the base class for the arguments."""
        if self.config.softmax_scale is not None:
            # megatron-core passes no scale to flash-attn in decode steps (attention.py: flash_attn_args), so the
            # queries carry the ratio to the usual one.
            q = q * (self.config.softmax_scale * math.sqrt(q.shape[-1]))
        if paged_attention.is_flash_attention_usable(self.config.params_dtype):
            arguments = (q, k, v, max_seqlen_q, max_seqlen_k, cu_seqlens_q, cu_seqlens_k, seqlens_k)
            output: torch.Tensor = super().flash_decode_and_prefill(*arguments, block_table, is_decode_only)
            return output
        assert isinstance(block_table, BlockTable), "the context is a TorchAttentionContext"
        lengths = (max_seqlen_q, max_seqlen_k, cu_seqlens_q, seqlens_k)
        return paged_attention.flash_decode_and_prefill(q, k, v, *lengths, block_table, is_decode_only)
