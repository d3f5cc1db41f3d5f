"""What other ranks do and say, where this rank cannot stand for them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_r1v2.rehearsal import other_ranks
from megatron_r1v2.rehearsal.collectives import Collective
from megatron_r1v2.rehearsal.fake_tensors import FakeTensors
from megatron_r1v2.rehearsal.other_ranks import OtherRanks
from megatron_r1v2.rehearsal.rows import LONG, SHORT
from megatron_r1v2.rehearsal.stand_ins import Script
from megatron_r1v2.stages import reference_log_probs
from megatron_r1v2.stages.grpo.segments import GroupsInFlight
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
    script = Script((1, 9), 1, (5, 9), (6, 9), max_prompt_tokens=20, max_response_tokens=10, mixed_groups=2)
    return OtherRanks(FakeTensors("cpu"), replace(script, whole_groups=2))


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


def test_groups_of_other_replicas_go_on_and_end_as_those_here(undone, others):
    """Two replicas: of each four prompts the long 0 and 2 and the short 0 are taken here, and 2 and 3 go on."""

    def settle(groups, prompts, rollouts):
        own = [*groups.prompts, *(each for each in prompts if each.key in {rollout.prompt_key for rollout in rollouts})]
        groups.prompts = [each for each in own if others.script.goes_on(each.key) and each in prompts]
        groups.steps = dict.fromkeys((each.key for each in groups.prompts), 0)
        return [each for each in own if each not in groups.prompts], list(rollouts)

    def step(number):
        prompts = [prompt(f"{LONG}-{number}-{index}") for index in range(4)]
        prompts += [prompt(f"{SHORT}-{number}-{index}", "text") for index in range(2)]
        taken = [response(each.key).rollout for each in (*groups.prompts, *prompts[0:5:2])]
        complete, mine = GroupsInFlight.settle(groups, prompts, taken)
        assert mine == taken
        return [each.key.removeprefix("rehearsed-") for each in complete]

    undone.setattr(GroupsInFlight, "settle", settle)
    groups = SimpleNamespace(prompts=[], steps={})
    others._install_segments()
    assert step(0) == ["long-0-0", "long-0-1", "short-0-0", "short-0-1"]
    assert set(groups.steps) == {f"{LONG}-0-2", f"{LONG}-0-3"}, "no prompt in flight is drawn anew"
    assert step(1) == ["long-0-2", "long-0-3", "long-1-0", "long-1-1", "short-1-0", "short-1-1"]
    assert set(groups.steps) == {f"{LONG}-1-2", f"{LONG}-1-3"}


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


def test_reference_log_probs_of_pairs_of_other_replicas_are_unknown_numbers(undone, others):
    undone.setattr(reference_log_probs, "_forward", lambda *_: {"b/chosen": -3.0, "b/rejected": -4.0})
    others._install_reference()
    sums = reference_log_probs._forward(None, None, [prompt("a"), prompt("b")])
    assert sums == {"a/chosen": 1.0, "a/rejected": 1.0, "b/chosen": -3.0, "b/rejected": -4.0}
    assert "an unknown number: 1" in {rule for rule, _ in others.mode.questions}
