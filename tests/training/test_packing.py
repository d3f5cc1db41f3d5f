"""Packed rows: every token once, in its place, with the positions and bounds of its own sequence."""

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.training.batches import RowFormat, collate
from megatron_r1v2.training.packing import pack, share, tokens_in_shared_row
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
    assert packed.params.bounds == tuple(bounds)
    assert packed.params.qkv_format == "sbhd"
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
        assert torch.equal(packed.params.positions_S, packed.position_ids_1S[0])
        assert torch.equal(packed.token_ids_1S[0, begin:end], batch.token_ids_BS[row, :length])
        assert torch.equal(packed.labels_1R[0, begin:end], batch.labels_BS[row, :length])
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


def test_a_shared_row_by_hand():
    prompt = PROMPTS[1]
    first, second, other = (
        make_sample(prompt, 0, length=2),
        make_sample(prompt, 1, length=3),
        make_sample(PROMPTS[0], 2),
    )
    rows = RowFormat(99, IMAGE_TOKEN, tensor_size=1, device=torch.device("cpu"))
    batch = collate([first, second, other], {prompt.key: prompt, PROMPTS[0].key: PROMPTS[0]}, rows)
    row = share(batch, tensor_size=1)
    before, last = prompt.token_ids[:-1], prompt.token_ids[-1]
    start = len(before)
    assert tokens_in_shared_row(batch) == start + 2 + 3 + len(other.token_ids) - 1
    expected = [*before, last, first.token_ids[-2], last, *second.token_ids[-3:-1], *other.token_ids[:-1]]
    assert row.token_ids_1S[0, : len(expected)].tolist() == expected
    alone = other.token_ids[other.prompt_length :]
    assert row.labels_1R[0].tolist() == [*first.token_ids[-2:], *second.token_ids[-3:], *alone]
    places = [*range(start, start + 5), *range(len(expected) - len(alone), len(expected))]
    assert row.params.responses.tolist() == places, "only tokens that predict a response token get logits"
    positions = [*range(start), start, start + 1, start, start + 1, start + 2, *range(len(other.token_ids) - 1)]
    assert row.params.positions_S.tolist()[: len(positions)] == positions
    shared, alone, padding = row.params.groups
    assert (shared.start, shared.prompt_end, shared.response_ends) == (0, start, (start + 2, start + 5))
    assert (alone.start, alone.prompt_end) == (start + 5, start + 5 + len(PROMPTS[0].token_ids) - 1)
    assert (padding.start, padding.prompt_end, padding.response_ends) == (len(expected), row.token_ids_1S.shape[1], ())
    assert row.image_mask_1S.sum() == sum(token == IMAGE_TOKEN for token in prompt.token_ids), "images enter once"
    assert row.tile_index.tolist() == [0]
    assert row.params.max_seqlen_q == max(len(second.token_ids), len(other.token_ids))
    assert row.params.qkv_format == "sbhd"


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.integers(0, 2), st.lists(st.integers(1, 20), min_size=1, max_size=3)), min_size=1, max_size=4
    ),
    tensor_size=st.sampled_from([1, 2, 3]),
    multiple=st.sampled_from([8, 16]),
)
def test_what_is_shared_comes_back_in_its_place(groups, tensor_size, multiple):
    batch = batch_of([(which, length) for which, responses in groups for length in responses])
    row = share(batch, tensor_size=tensor_size, length_multiple=multiple)
    size = row.token_ids_1S.shape[1]
    unit = math.lcm(multiple, tensor_size)
    assert size == math.ceil(tokens_in_shared_row(batch) / unit) * unit
    # Every token stands behind the prompt that it had in its own row.
    values_1S = torch.arange(1.0, size + 1)[None].requires_grad_()
    unpacked_BS = row.unpack(values_1S[:, row.params.responses])
    mask_BS = batch.response_mask_BS.bool()
    assert unpacked_BS.shape == mask_BS.shape
    assert torch.equal(unpacked_BS != 0, mask_BS), "each response token once, nothing else"
    places = unpacked_BS[mask_BS].long() - 1
    assert len(set(places.tolist())) == len(places)
    assert torch.equal(row.token_ids_1S[0, places], batch.token_ids_BS[mask_BS])
    assert torch.equal(row.unpack(row.labels_1R.float()).long()[mask_BS], batch.labels_BS[mask_BS])
    assert torch.equal(row.position_ids_1S[0, places], batch.position_ids_BS[mask_BS])
    assert int(row.image_mask_1S.sum()) == 2 * len(row.tile_index), "two tokens a tile"
    unpacked_BS.sum().backward()
    assert values_1S.grad.sum() == mask_BS.sum()
