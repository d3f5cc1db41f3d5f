"""Packed rows: every token once, in its place, with the positions and bounds of its own sequence."""

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.training.batches import RowFormat, collate
from megatron_r1v2.training.packing import pack
from megatron_r1v2.types import TrainingBatch
from tests.stages.scripted import IMAGE_TOKEN, make_prompt, make_sample

PROMPTS = [make_prompt(f"p{tiles}", tiles=tiles) for tiles in range(3)]


def batch_of(lengths: list[tuple[int, int]]) -> TrainingBatch:
    """Return a padded batch of (prompt, response length) rows."""
    samples = [make_sample(PROMPTS[which], row, length=length) for row, (which, length) in enumerate(lengths)]
    rows = RowFormat(99, IMAGE_TOKEN, tensor_size=1, device=torch.device("cpu"))
    return collate(samples, {prompt.key: prompt for prompt in PROMPTS}, rows)


def test_a_short_row_by_hand():
    batch = batch_of([(0, 1), (0, 12)])
    first, second = (len(PROMPTS[0].token_ids) + response - 1 for response in (1, 12))
    packed = pack(batch, tensor_size=1)
    bounds = [0, 8 * math.ceil(first / 8), 8 * math.ceil(first / 8) + 8 * math.ceil(second / 8)]
    assert packed.params.cu_seqlens_q.tolist() == packed.params.cu_seqlens_kv.tolist() == bounds
    assert packed.params.max_seqlen_q == max(bounds[1], bounds[2] - bounds[1])
    assert packed.params.qkv_format == "thd"
    assert packed.token_ids_1S.shape == (1, bounds[2])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 20)), min_size=1, max_size=5),
    tensor_size=st.sampled_from([1, 2, 3]),
    multiple=st.sampled_from([8, 16]),
)
def test_what_is_packed_comes_back_in_its_place(lengths, tensor_size, multiple):
    batch = batch_of(lengths)
    packed = pack(batch, tensor_size=tensor_size, length_multiple=multiple)
    bounds = packed.params.cu_seqlens_q.tolist()
    for row, (begin, end) in enumerate(itertools.pairwise(bounds)):
        length = end - begin
        assert packed.position_ids_1S[0, begin:end].tolist() == list(range(length)), "each sequence begins at 0"
        assert torch.equal(packed.token_ids_1S[0, begin:end], batch.token_ids_BS[row, :length])
        assert torch.equal(packed.labels_1S[0, begin:end], batch.labels_BS[row, :length])
        assert torch.equal(packed.image_mask_1S[0, begin:end], batch.image_mask_BS[row, :length])
        assert batch.response_mask_BS[row, length:].sum() == 0, "no response token is left behind"
    values_1S = torch.arange(1.0, packed.token_ids_1S.shape[1] + 1)[None].requires_grad_()
    unpacked_BS = packed.unpack(values_1S)
    assert unpacked_BS.shape == batch.token_ids_BS.shape
    for row, (begin, end) in enumerate(itertools.pairwise(bounds)):
        assert torch.equal(unpacked_BS[row, : end - begin], values_1S[0, begin:end])
        assert not unpacked_BS[row, end - begin :].any()
    (unpacked_BS * batch.response_mask_BS).sum().backward()
    assert values_1S.grad is not None
    assert values_1S.grad.sum() == batch.response_mask_BS.sum()
