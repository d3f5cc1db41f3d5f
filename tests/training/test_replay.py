"""The samples behind the buffer: kept, saved, split over another number of ranks, and dealt to trainers."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.parallel import groups
from megatron_r1v2.training.replay import ReplayStore, assign, send_to_trainers
from tests.stages.scripted import make_prompt, make_sample, same_prompt

PROMPTS = {f"p{tiles}": make_prompt(f"p{tiles}", tiles=tiles) for tiles in range(3)}


def samples_of(*names: str):
    """Return samples by id; "p1/0" is sample 0 of prompt p1."""
    return {name: make_sample(PROMPTS[name[:2]], int(name[3:]), length=2 + int(name[3:])) for name in names}


def filled(*names: str) -> ReplayStore:
    store = ReplayStore()
    store.add(samples_of(*names), PROMPTS)
    return store


def through_a_file(state):
    """Save as the checkpoint does, and load without trusting the file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_a_prompt_is_kept_once_and_as_long_as_a_sample_needs_it():
    store = filled("p1/0", "p1/1", "p2/0")
    assert set(store.prompts) == {"p1", "p2"}
    store.drop(["p1/0", "of another rank"])
    assert (set(store.samples), set(store.prompts)) == ({"p1/1", "p2/0"}, {"p1", "p2"})
    store.drop(["p1/1"])
    assert (set(store.samples), set(store.prompts)) == ({"p2/0"}, {"p2"})


def test_a_saved_store_comes_back_equal():
    store, again = filled("p0/3", "p1/0", "p2/1"), ReplayStore()
    again.load_state_dicts([through_a_file(store.state_dict())], data_rank=0, data_size=1)
    assert again.samples == store.samples
    assert again.prompts.keys() == store.prompts.keys()
    assert all(same_prompt(again.prompts[key], prompt) for key, prompt in store.prompts.items())


def test_loading_replaces_what_was_there():
    store = filled("p0/3")
    store.load_state_dicts([filled("p1/0").state_dict()], data_rank=0, data_size=1)
    assert (set(store.samples), set(store.prompts)) == ({"p1/0"}, {"p1"})


def test_an_equal_number_of_ranks_keeps_every_shard_where_it_was():
    shards = [filled("p2/0", "p0/0").state_dict(), filled("p1/0").state_dict()]
    for rank, names in enumerate(({"p2/0", "p0/0"}, {"p1/0"})):
        store = ReplayStore()
        store.load_state_dicts(shards, data_rank=rank, data_size=2)
        assert set(store.samples) == names


@pytest.mark.parametrize("data_size", [1, 3, 4, 9])
def test_another_number_of_ranks_shares_everything_out(data_size):
    names = ["p0/0", "p0/1", "p1/0", "p1/1", "p1/2", "p2/0", "p2/1"]
    shards = [through_a_file(filled(*names[:5]).state_dict()), through_a_file(filled(*names[5:]).state_dict())]
    stores = [ReplayStore() for _ in range(data_size)]
    for rank, store in enumerate(stores):
        store.load_state_dicts(shards, data_rank=rank, data_size=data_size)
    assert sorted(name for store in stores for name in store.samples) == names, "each sample on one rank"
    sizes = [len(store.samples) for store in stores]
    assert max(sizes) - min(sizes) <= 1
    for store in stores:
        assert store.samples == samples_of(*store.samples)
        assert set(store.prompts) == {name[:2] for name in store.samples}


lengths = st.dictionaries(st.text("abcd", min_size=1, max_size=4), st.integers(1, 100), max_size=20)


@settings(deadline=None)
@given(lengths=lengths, data_size=st.integers(1, 5))
def test_every_sample_gets_a_trainer_and_tokens_are_balanced(lengths, data_size):
    owner = assign(lengths, data_size)
    assert owner.keys() == lengths.keys()
    load = [sum(lengths[name] for name in lengths if owner[name] == rank) for rank in range(data_size)]
    assert sum(load) == sum(lengths.values())
    assert max(load) - min(load) <= max(lengths.values(), default=0)
    assert owner == assign(dict(reversed(lengths.items())), data_size), "every rank decides alike"


def test_trainers_by_hand():
    assert assign({"a": 5, "b": 9, "c": 5, "d": 1}, 2) == {"b": 0, "a": 1, "c": 1, "d": 0}
    assert assign({"a": 5}, 3) == {"a": 0}


def test_a_sample_that_nobody_holds_is_an_error_with_its_name():
    context = groups.initialize(ParallelConfig(), seed=1)
    try:
        arguments = {"group": context.groups.dp, "device": context.device}
        held = samples_of("p1/1", "p2/0", "p0/0")
        mine, prompts = send_to_trainers(held, PROMPTS, {"p2/0": 0, "p0/0": 0}, **arguments)
        assert list(mine) == ["p0/0", "p2/0"]
        assert set(prompts) == {"p0", "p2"}
        with pytest.raises(RuntimeError, match=r"1 samples.*'p2/9'.*buffer\.capacity=0"):
            send_to_trainers(held, PROMPTS, {"p2/0": 0, "p2/9": 0}, **arguments)
    finally:
        groups.shut_down()
