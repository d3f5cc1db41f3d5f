"""What other ranks do and say, where this rank cannot stand for them."""

from types import SimpleNamespace

import pytest
import torch

from megatron_r1v2.rehearsal import other_ranks
from megatron_r1v2.rehearsal.collectives import Collective
from megatron_r1v2.rehearsal.fake_tensors import FakeTensors
from megatron_r1v2.rehearsal.other_ranks import OtherRanks
from megatron_r1v2.stages.pairs import PairMaker
from megatron_r1v2.types import Rollout, Sample, ScoredRollout


def call(kind, peer=-1):
    return Collective(kind, (0, 1), "int64", 3, 24, peer=peer)


def prompt(key, modality="image"):
    return SimpleNamespace(key=key, modality=modality)


def response(key, index=0):
    rollout = Rollout(key, index, (1, 2), (0.0, 0.0), 0, "stop")
    return ScoredRollout(rollout=rollout, text="", rewards={}, total=1.0, rule_correct=True, claims=())


@pytest.fixture
def others():
    return OtherRanks(FakeTensors("cpu"))


def test_neighbours_announce_their_shapes_in_order(others):
    others.shapes = {1: [(8, 1, 4), (16, 1, 4)]}
    shape = torch.zeros(3, dtype=torch.int64)
    assert others._send(call("recv_", 2), shape) is None, "nothing of another neighbour"
    assert others._send(call("recv_", 1), torch.zeros(3)) is None, "hidden states are no shape"
    assert others._send(call("recv_", 1), shape).tolist() == [8, 1, 4]
    assert others._send(call("recv_", 1), shape).tolist() == [16, 1, 4]
    assert others._send(call("recv_", 1), shape) is None


def test_drawn_tokens_and_the_number_of_a_prompt_are_broadcast_once(others):
    others.drawn, others.index = torch.ones(2, 3, dtype=torch.float64), torch.tensor([5])
    assert others._send(call("broadcast_"), torch.zeros(1, dtype=torch.int64)).tolist() == [5]
    assert others._send(call("broadcast_"), torch.zeros(2, 3, dtype=torch.float64)).sum() == 6
    assert others._send(call("broadcast_"), torch.zeros(1, dtype=torch.int64)) is None


def test_responses_of_other_replicas_are_those_to_a_prompt_of_the_same_kind():
    prompts = [prompt("a"), prompt("b", "text"), prompt("c", "text"), prompt("d")]
    completed = other_ranks._complete(prompts, [response("a"), response("a", 1), response("b")])
    assert [(each.rollout.prompt_key, each.rollout.sample_index) for each in completed] == [
        *(("a", 0), ("a", 1), ("b", 0), ("c", 0), ("d", 0), ("d", 1))
    ]


def test_samples_that_others_send_are_as_long_as_an_own_one():
    own = Sample(prompt_key="a", sample_index=0, token_ids=(1, 2, 3), prompt_length=2, modality="image")
    trainer = {"a/0/0": 0, "b/0/3": 1, "c/0/1": 0}
    complete = other_ranks._with_received({"a/0/0": own}, trainer, 1)
    assert set(complete) == {"a/0/0", "b/0/3"}
    assert (complete["b/0/3"].prompt_key, complete["b/0/3"].sample_index) == ("b", 3)
    assert complete["b/0/3"].token_ids == own.token_ids


@pytest.mark.parametrize(
    ("data_size", "expected"),
    [(1, {"a": "pair"}), (2, {"a": "pair", "c": "pair"})],
)
def test_pairs_of_other_replicas_are_those_of_a_prompt_of_the_same_kind(undone, others, data_size, expected):
    undone.setattr(PairMaker, "make_pairs", lambda maker, *_, **__: maker._gather({"a": "pair"}))
    undone.setattr(PairMaker, "_gather", lambda _, mine: dict(mine))
    others._install_pairs()
    maker = PairMaker.__new__(PairMaker)
    maker.loaded = SimpleNamespace(context=SimpleNamespace(data_size=data_size))
    # Of the text prompt this replica has nothing, so it has nothing to say of it.
    assert maker.make_pairs([prompt("a"), prompt("b", "text"), prompt("c")]) == expected
