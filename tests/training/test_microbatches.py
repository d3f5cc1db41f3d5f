"""Microbatches of one update: rows and names agree, pairs are neighbours, the filler weighs nothing."""

import math

import torch

from megatron_r1v2.config.schema import Packing, TrainConfig
from megatron_r1v2.training.batches import RowFormat
from megatron_r1v2.training.microbatches import Microbatcher
from megatron_r1v2.training.packing import share
from tests.stages.scripted import IMAGE_TOKEN, make_prompt, make_sample

PROMPTS = {key: make_prompt(key, tiles=tiles) for key, tiles in (("a", 1), ("b", 2), ("c", 0))}


def separate(tokens: int) -> Microbatcher:
    settings = TrainConfig(packing=Packing.first_fit_decreasing, tokens_per_microbatch=tokens)
    return Microbatcher(settings, RowFormat(99, IMAGE_TOKEN, tensor_size=1, device=torch.device("cpu")))


def test_rows_are_the_named_samples():
    samples = {key: make_sample(prompt, length=3) for key, prompt in PROMPTS.items()}
    found = separate(32).split(samples, PROMPTS, replayed={"b"})
    assert [len(part.names) for part in found] == [2, 1]
    for part in found:
        for row, name in enumerate(part.names):
            ids = list(samples[name].token_ids)
            assert part.batch.token_ids_BS[row, : len(ids) - 1].tolist() == ids[:-1]
            assert bool(part.batch.replayed_B[row]) == (name == "b")
    assert sorted(name for part in found for name in part.names) == ["a", "b", "c"]


def test_the_rows_of_a_unit_are_neighbours_and_share_their_tiles():
    samples = {f"{key}/{side}": make_sample(prompt, side) for key, prompt in PROMPTS.items() for side in (0, 1)}
    units = {key: (f"{key}/0", f"{key}/1") for key in PROMPTS}
    found = separate(80).split(samples, PROMPTS, units=units)
    for part in found:
        assert [name[:1] for name in part.names[::2]] == [name[:1] for name in part.names[1::2]]
        assert [name[-1] for name in part.names] == ["0", "1"] * (len(part.names) // 2)
    assert sum(part.batch.tiles_TCHW.shape[0] for part in found) == 3, "each prompt's tiles once"


def shared(tokens: int) -> Microbatcher:
    settings = TrainConfig(packing=Packing.shared, tokens_per_microbatch=tokens)
    return Microbatcher(settings, RowFormat(99, IMAGE_TOKEN, tensor_size=1, device=torch.device("cpu")))


def test_responses_to_one_prompt_are_neighbours_wherever_they_come_from():
    samples = {f"{index}/{key}": make_sample(PROMPTS[key], index) for index in range(3) for key in PROMPTS}
    (microbatch,) = shared(1024).split(samples, PROMPTS, replayed={"2/a"})
    assert microbatch.batch.rows_per_prompt == (3, 3, 3)
    assert sorted(microbatch.names) == sorted(samples)
    assert [name[-1] for name in microbatch.names[::3]] == [name[-1] for name in microbatch.names[2::3]]


def test_a_prompt_counts_once_a_microbatch():
    prompt = PROMPTS["a"]
    samples = {str(index): make_sample(prompt, index, length=5) for index in range(4)}
    tokens = len(prompt.token_ids) - 1
    room = math.ceil((tokens + 20) / 8) * 8
    assert [len(part.names) for part in shared(room).split(samples, PROMPTS)] == [4]
    assert [len(part.names) for part in shared(math.ceil((tokens + 10) / 8) * 8).split(samples, PROMPTS)] in (
        [2, 2],
        [3, 1],
    )
    for part in shared(room).split(samples, PROMPTS):
        row = share(part.batch, tensor_size=1)
        assert row.token_ids_1S.shape[1] <= room


def test_the_rows_of_a_pair_are_neighbours_in_shared_rows_too():
    samples = {f"{key}/{side}": make_sample(prompt, side) for key, prompt in PROMPTS.items() for side in (0, 1)}
    units = {key: (f"{key}/0", f"{key}/1") for key in PROMPTS}
    for tokens in (8, 1024):
        for part in shared(tokens).split(samples, PROMPTS, units=units):
            assert [name[-1] for name in part.names] == ["0", "1"] * (len(part.names) // 2)
            assert set(part.batch.rows_per_prompt) == {2}


def test_no_samples_give_no_microbatch_and_the_filler_weighs_nothing():
    assert separate(32).split({}, {}) == []
    filler = separate(32).filler(PROMPTS["b"], rows=2)
    assert filler.weights_B.tolist() == [0.0, 0.0]
    assert filler.tiles_TCHW.shape[0] == 2
