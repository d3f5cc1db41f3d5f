"""A padded microbatch laid out in one row, so that nothing runs on padding, nor twice on a prompt of several rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_r1v2.models.shared_attention import PackedRowParams, RowParams, SharedGroup, SharedRowParams
from megatron_r1v2.training.batches import LENGTH_MULTIPLE
from megatron_r1v2.types import TrainingBatch


@dataclass(frozen=True)
class PackedBatch:
    """A batch in one row, and the way back."""

    token_ids_1S: torch.Tensor
    position_ids_1S: torch.Tensor
    labels_1R: torch.Tensor
    """Of the tokens that the model gives a value: all of a packed row, the responses of a shared one."""
    image_mask_1S: torch.Tensor
    tile_index: torch.Tensor
    """int64: of the tiles of the row, among the distinct ones."""
    params: RowParams
    """Bounds of the sequences, or groups of them, for attention."""
    columns: torch.Tensor
    """int64 [R]: flat index into a [B, S] tensor of each label."""
    shape: torch.Size
    """Of the padded batch: [B, S]."""

    def unpack(self, values_1R: torch.Tensor) -> torch.Tensor:
        """Lay the values of the labels out as rows [B, S] again, zero elsewhere; differentiable."""
        flat = values_1R.new_zeros(self.shape.numel())
        return flat.index_put((self.columns,), values_1R[0]).view(self.shape)


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
    position_S = torch.cat([torch.arange(length) for length in lengths]).to(device)
    bounds = tuple(itertools.accumulate(lengths, initial=0))
    bounds_on_device = torch.tensor(bounds, dtype=torch.int32, device=device)
    params = PackedRowParams(
        qkv_format="sbhd",
        cu_seqlens_q=bounds_on_device,
        cu_seqlens_kv=bounds_on_device,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        positions_S=position_S,
        bounds=bounds,
    )
    token_ids_1S, labels_1S, image_mask_1S = (
        tensor.flatten()[columns][None] for tensor in (batch.token_ids_BS, batch.labels_BS, batch.image_mask_BS)
    )
    return PackedBatch(
        token_ids_1S,
        position_S[None],
        labels_1S,
        image_mask_1S,
        batch.tile_index,
        params,
        columns,
        batch.token_ids_BS.shape,
    )


def share(batch: TrainingBatch, *, tensor_size: int, length_multiple: int = LENGTH_MULTIPLE) -> PackedBatch:
    """Lay each prompt out once, followed by the responses to it.

    A prompt without its last token comes first, then for each response the last prompt token and the response without
    its last token: each response has logits of its own for its first token.

    Args:
        batch: padded on the right, rows of one prompt as neighbours.
        length_multiple: the row is padded to a multiple of this; FP8 wants more than bf16.
    """
    groups: list[SharedGroup] = []
    columns: list[torch.Tensor] = []
    """Of each part of the row: flat index into [B, S]."""
    positions: list[torch.Tensor] = []
    tokens: list[torch.Tensor] = []
    first_rows = list(itertools.accumulate(batch.rows_per_prompt, initial=0))
    row_of_columns, end = batch.token_ids_BS.shape[1], 0
    for first, after in itertools.pairwise(first_rows):
        start, prompt = end, batch.num_prompt_tokens_B[first] - 1
        positions.append(torch.arange(prompt))
        columns.append(first * row_of_columns + positions[-1])
        ends = [start + prompt]
        for row in range(first, after):
            length = batch.num_response_tokens_B[row]
            positions.append(torch.arange(prompt, prompt + length))
            columns.append(row * row_of_columns + positions[-1])
            tokens.append(torch.arange(ends[-1], ends[-1] + length))
            ends.append(ends[-1] + length)
        groups.append(SharedGroup(start, start + prompt, tuple(ends[1:])))
        end = ends[-1]
    padding = -end % math.lcm(length_multiple, tensor_size)
    if padding:
        # A sequence by itself, which nothing else sees.
        groups.append(SharedGroup(end, end + padding))
    device = batch.token_ids_BS.device
    at, position_S = torch.cat(columns).to(device), F.pad(torch.cat(positions), (0, padding)).to(device)
    token_ids_1S, image_mask_1S = (
        F.pad(tensor.flatten()[at], (0, padding))[None] for tensor in (batch.token_ids_BS, batch.image_mask_BS)
    )
    responses = torch.cat(tokens).to(device)
    of_labels = at[responses]
    longest = max(map(sum, zip(batch.num_prompt_tokens_B, batch.num_response_tokens_B, strict=True)))
    params = SharedRowParams(
        qkv_format="sbhd",
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        groups=tuple(groups),
        positions_S=position_S,
        responses=responses,
    )
    return PackedBatch(
        token_ids_1S,
        position_S[None],
        batch.labels_BS.flatten()[of_labels][None],
        image_mask_1S,
        _tiles_of_rows(batch, first_rows[:-1]),
        params,
        of_labels,
        batch.token_ids_BS.shape,
    )


def tokens_in_shared_row(batch: TrainingBatch) -> int:
    """Return the tokens of the row that `share` makes, padding aside."""
    first_rows = itertools.accumulate(batch.rows_per_prompt[:-1], initial=0)
    return sum(batch.num_prompt_tokens_B[row] - 1 for row in first_rows) + sum(batch.num_response_tokens_B)


def _tiles_of_rows(batch: TrainingBatch, rows: Sequence[int]) -> torch.Tensor:
    """Return the part of the tile index that belongs to some rows."""
    ends = list(itertools.accumulate(batch.num_tiles_B))
    return torch.cat([batch.tile_index[ends[row] - batch.num_tiles_B[row] : ends[row]] for row in rows])
