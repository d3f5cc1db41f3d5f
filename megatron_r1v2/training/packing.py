"""Rows of a padded microbatch laid one after the other, so that no attention and no MLP runs on padding."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_r1v2.training.batches import LENGTH_MULTIPLE
from megatron_r1v2.types import TrainingBatch


@dataclass(frozen=True)
class PackedBatch:
    """The sequences of a batch in one row, and the way back."""

    token_ids_1S: torch.Tensor
    position_ids_1S: torch.Tensor
    labels_1S: torch.Tensor
    image_mask_1S: torch.Tensor
    params: PackedSeqParams
    """Bounds of the sequences, for attention."""
    columns: torch.Tensor
    """int64 [tokens]: flat index into a [B, S] tensor of each packed token."""
    shape: torch.Size
    """Of the padded batch: [B, S]."""

    def unpack(self, values_1S: torch.Tensor) -> torch.Tensor:
        """Lay packed values out as rows [B, S] again, zero elsewhere; differentiable.

        Args:
            values_1S: float [1, packed tokens].
        """
        flat = values_1S.new_zeros(self.shape.numel())
        return flat.index_put((self.columns,), values_1S[0, : len(self.columns)]).view(self.shape)


def pack(batch: TrainingBatch, *, tensor_size: int, length_multiple: int = LENGTH_MULTIPLE) -> PackedBatch:
    """Pack the rows of a microbatch into one.

    Each sequence keeps a little padding at its end, so that sequence parallelism divides the row.

    Args:
        batch: padded on the right.
        length_multiple: sequences are padded to a multiple of this; FP8 wants more than bf16.
    """
    multiple = math.lcm(length_multiple, tensor_size)
    columns_per_row = batch.token_ids_BS.shape[1]
    lengths = [
        # The batch may have been padded to a smaller multiple than this one.
        min(columns_per_row, math.ceil((prompt + response - 1) / multiple) * multiple)
        for prompt, response in zip(batch.num_prompt_tokens_B, batch.num_response_tokens_B, strict=True)
    ]
    device = batch.token_ids_BS.device
    # Rows are padded on the right, so a sequence is the beginning of its row.
    columns = torch.cat([row * columns_per_row + torch.arange(length) for row, length in enumerate(lengths)]).to(device)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    token_ids_1S, position_ids_1S, labels_1S, image_mask_1S = (
        tensor.flatten()[columns][None]
        for tensor in (batch.token_ids_BS, batch.position_ids_BS, batch.labels_BS, batch.image_mask_BS)
    )
    return PackedBatch(
        token_ids_1S, position_ids_1S, labels_1S, image_mask_1S, params, columns, batch.token_ids_BS.shape
    )
