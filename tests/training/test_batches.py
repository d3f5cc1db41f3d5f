"""Microbatches: every token, log-prob and tile is where the loss looks for it."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.config.schema import Packing, TrainConfig
from megatron_r1v2.training.batches import RowFormat, collate, filler_sample, split_into_microbatches
from tests.stages.scripted import IMAGE_TOKEN, make_prompt, make_sample

PAD = 99


def pack(samples, prompts, *, tensor_size=1, **arguments):
    return collate(
        samples,
        {prompt.key: prompt for prompt in prompts},
        RowFormat(PAD, IMAGE_TOKEN, tensor_size=tensor_size, device=torch.device("cpu")),
        **arguments,
    )


def as_units(lengths):
    return {name: [length] for name, length in lengths.items()}


@settings(deadline=None)
@given(
    lengths=st.dictionaries(st.text("abc", min_size=1, max_size=4), st.integers(1, 50), max_size=12),
    tokens=st.integers(1, 100),
)
def test_microbatches_are_a_partition_longest_first(lengths, tokens):
    settings = TrainConfig(packing=Packing.first_fit_decreasing, tokens_per_microbatch=tokens)
    microbatches = split_into_microbatches(as_units(lengths), settings)
    flat = [name for names in microbatches for name in names]
    assert sorted(flat) == sorted(lengths)
    padded = {name: math.ceil(length / 8) * 8 for name, length in lengths.items()}
    assert all(len(names) == 1 or sum(padded[name] for name in names) <= tokens for names in microbatches)
    firsts = [padded[names[0]] for names in microbatches]
    assert firsts == sorted(firsts, reverse=True)
    assert microbatches == split_into_microbatches(as_units(dict(reversed(lengths.items()))), settings)


def test_packed_microbatches_are_filled_by_tokens():
    settings = TrainConfig(packing=Packing.first_fit_decreasing, tokens_per_microbatch=10)
    lengths = {"a": 6, "b": 3, "c": 12, "d": 4, "e": 7}
    assert split_into_microbatches(as_units(lengths), settings, length_multiple=1) == [["c"], ["e", "b"], ["a", "d"]]
    assert split_into_microbatches({}, settings) == []


def test_packed_microbatches_have_room_for_the_padding_of_each_sequence():
    settings = TrainConfig(packing=Packing.first_fit_decreasing, tokens_per_microbatch=16)
    # 9 tokens take 16 with padding, so nothing joins them, although 9 + 7 would fit.
    assert split_into_microbatches(as_units({"a": 9, "b": 7, "c": 8}), settings) == [["a"], ["b", "c"]]


def test_neighbouring_rows_of_a_prompt_are_counted():
    prompts = [make_prompt("a", tiles=1), make_prompt("b", tiles=2)]
    first, other, again = make_sample(prompts[0], 0), make_sample(prompts[1], 0), make_sample(prompts[0], 1)
    assert pack([first, again, other], prompts).rows_per_prompt == (2, 1)
    assert pack([first, other, again], prompts).rows_per_prompt == (1, 1, 1)
    assert pack([first, other, again], prompts).num_tiles_B == (1, 2, 1)
    # The same key with other tokens: the template has changed since the sample was kept.
    longer = replace(again, token_ids=(1, *again.token_ids), prompt_length=again.prompt_length + 1)
    assert pack([first, longer], prompts).rows_per_prompt == (1, 1)


def test_pairs_stay_together():
    pairs = {"a": [5, 9], "b": [4, 4], "c": [8, 1]}
    alone = TrainConfig(packing=Packing.first_fit_decreasing, tokens_per_microbatch=1)
    assert split_into_microbatches(pairs, alone) == [["a"], ["b"], ["c"]]
    packed = TrainConfig(packing=Packing.first_fit_decreasing, tokens_per_microbatch=40)
    # With padding to multiples of 8: 24, 16 and 16 tokens.
    assert split_into_microbatches(pairs, packed) == [["a", "b"], ["c"]]


def test_a_row_by_hand():
    """Prompt (image, image, 5), response (7, image): the columns that predict 7 and image are trained."""
    prompt = make_prompt("p", tiles=1)
    sample = make_sample(prompt)
    prompt = type(prompt)(**vars(prompt) | {"token_ids": (IMAGE_TOKEN, IMAGE_TOKEN, 5)})
    fields = {"token_ids": (*prompt.token_ids, 7, IMAGE_TOKEN), "prompt_length": 3}
    fields |= {"rl": replace(sample.rl, old_log_probs=(-0.1, -0.2), rollout_log_probs=(-0.3, -0.4))}
    batch = pack([replace(sample, **fields)], [prompt], weights=[0.5], replayed=[True])
    zeros = [0.0] * 4
    assert batch.token_ids_BS.tolist() == [[IMAGE_TOKEN, IMAGE_TOKEN, 5, 7, IMAGE_TOKEN, PAD, PAD, PAD]]
    assert batch.labels_BS.tolist() == [[IMAGE_TOKEN, 5, 7, IMAGE_TOKEN, PAD, PAD, PAD, PAD]]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert batch.response_mask_BS.tolist() == [[0, 0, 1, 1, *zeros]]
    torch.testing.assert_close(batch.old_log_probs_BS, torch.tensor([[0, 0, -0.1, -0.2, *zeros]]))
    torch.testing.assert_close(batch.rollout_log_probs_BS, torch.tensor([[0, 0, -0.3, -0.4, *zeros]]))
    assert batch.image_mask_BS.tolist() == [[True, True, *[False] * 6]], "in the response it is a word"
    assert (batch.num_prompt_tokens_B, batch.num_response_tokens_B) == ((3,), (2,))
    assert (batch.weights_B.tolist(), batch.replayed_B.tolist(), batch.has_image_B.tolist()) == ([0.5], [True], [True])


rows = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20), st.booleans()), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(rows=rows, tensor_size=st.sampled_from([1, 2, 3, 8]))
def test_rows_keep_their_tokens_log_probs_and_tiles(rows, tensor_size):
    """Prompt i has i tiles; prompts repeat over rows, some rows have no old log-probs yet."""
    prompts = [make_prompt(f"prompt-{tiles}", tiles=tiles) for tiles in range(4)]
    samples = [
        make_sample(prompts[which], index, length=length, old=old) for index, (which, length, old) in enumerate(rows)
    ]
    batch = pack(samples, prompts, tensor_size=tensor_size)
    length = batch.token_ids_BS.shape[1]
    assert length % tensor_size == 0
    assert length % 8 == 0
    assert length - math.lcm(8, tensor_size) < max(len(sample.token_ids) for sample in samples) - 1 <= length
    for row, sample in enumerate(samples):
        ids = list(sample.token_ids)
        assert [*batch.token_ids_BS[row].tolist(), PAD][: len(ids) - 1] == ids[:-1]
        assert batch.token_ids_BS[row, len(ids) :].eq(PAD).all()
        mask_S = batch.response_mask_BS[row].bool()
        assert batch.labels_BS[row][mask_S].tolist() == ids[sample.prompt_length :]
        expected = list(sample.rl.old_log_probs or [math.nan] * sample.response_length)
        assert batch.old_log_probs_BS[row][mask_S].tolist() == pytest.approx(expected, nan_ok=True)
        assert not batch.old_log_probs_BS[row][~mask_S].any()
        assert batch.rollout_log_probs_BS[row][mask_S].tolist() == list(sample.rl.rollout_log_probs)
        assert not batch.old_log_probs_BS[row][~mask_S].any()
        assert batch.image_mask_BS[row].sum() == ids[: sample.prompt_length].count(IMAGE_TOKEN)
    tiles = [prompts[which].tiles_TCHW for which, _, _ in rows]
    assert torch.equal(batch.tiles_TCHW[batch.tile_index], torch.cat(tiles))
    distinct = {which for which, _, _ in rows if which}
    assert {prompt.key for prompt in batch.image_prompts} == {f"prompt-{which}" for which in distinct}
    assert batch.tiles_TCHW.shape[0] == sum(distinct), "rows of one prompt share its tiles"
    if batch.image_prompts:
        assert torch.equal(batch.tiles_TCHW, torch.cat([prompt.tiles_TCHW for prompt in batch.image_prompts]))
    assert batch.weights_B.tolist() == [1.0] * len(rows)
    assert batch.has_image_B.tolist() == [which > 0 for which, _, _ in rows]


def test_tiles_wait_on_the_host_for_their_microbatch():
    """All of a step's would fill gigabytes of a GPU, where features in the cache need none of them."""
    prompt = make_prompt("p", tiles=2)
    on_device = RowFormat(PAD, IMAGE_TOKEN, tensor_size=1, device=torch.device("meta"))
    batch = collate([make_sample(prompt)], {"p": prompt}, on_device)
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert [name for name, value in tensors.items() if value.device.type == "cpu"] == ["tiles_TCHW"]


def test_the_filler_has_the_shape_of_a_sample_and_no_weight():
    for tiles in (0, 2):
        prompt = make_prompt("p", tiles=tiles)
        sample = filler_sample(prompt)
        assert (sample.response_length, sample.rl, sample.modality) == (1, None, prompt.modality)
        batch = pack([sample], [prompt], weights=[0.0])
        assert batch.advantages_B.tolist() == [0.0]
        assert batch.weights_B.tolist() == [0.0]
        assert batch.response_mask_BS.sum() == 1
        assert batch.tiles_TCHW.shape[0] == tiles
