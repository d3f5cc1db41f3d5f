"""Whether the collectives of several ranks fit together."""

from dataclasses import replace

import pytest

from megatron_r1v2.rehearsal.collectives import Collective, CollectiveLog, count_by_kind, find_mismatches

REDUCE = Collective("allreduce_", (0, 1), "float32", 8, 32, phase="update")
SEND = Collective("send", (0, 2), "bfloat16", 16, 32, peer=2)
RECEIVE = Collective("recv_", (0, 2), "bfloat16", 16, 32, peer=0)


def test_equal_calls_fit():
    assert find_mismatches({0: [REDUCE, REDUCE], 1: [REDUCE, REDUCE]}) == []


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ([REDUCE], "rank 1: nothing"),
        ([REDUCE, replace(REDUCE, kind="broadcast_")], "rank 1: broadcast_ of 8 float32"),
        ([REDUCE, replace(REDUCE, count=9)], "rank 1: allreduce_ of 9 float32"),
        ([REDUCE, replace(REDUCE, dtype="bfloat16")], "rank 1: allreduce_ of 8 bfloat16"),
    ],
)
def test_a_call_that_differs_is_named_with_its_phase(other, words):
    (found,) = find_mismatches({0: [REDUCE, REDUCE], 1: other})
    assert "call 2 in the group of 2 ranks (0, 1)" in found
    assert "rank 0: allreduce_ of 8 float32 (update)" in found
    assert words in found


def test_a_broadcast_from_another_rank_differs():
    first = replace(REDUCE, kind="broadcast_", peer=0)
    assert find_mismatches({0: [first], 1: [first]}) == []
    (found,) = find_mismatches({0: [first], 1: [replace(first, peer=1)]})
    assert "rank 0: broadcast_ of 8 float32 from rank 0 (update); rank 1: broadcast_ of 8 float32 from rank 1" in found


def test_groups_that_come_in_another_order_would_wait_for_each_other():
    world = replace(REDUCE, ranks=(0, 1, 2, 3), kind="barrier", phase="save")
    assert find_mismatches({0: [REDUCE, SEND, world], 1: [REDUCE, world]}) == []
    (found,) = find_mismatches({0: [REDUCE, world], 1: [world, REDUCE]})
    assert found == (
        "calls in two groups come in another order: "
        "rank 0: allreduce_ of 8 float32 (update) in the group of 2 ranks (0, 1); "
        "rank 1: barrier of 8 float32 (save) in the group of 4 ranks (0, 1, 2, 3)"
    )
    (found,) = find_mismatches({0: [REDUCE, world], 1: [world]})
    assert found.startswith("call 1 in the group of 2 ranks"), "a call that is missing is named by itself"


def test_only_groups_that_two_ranks_share_are_compared():
    alone = replace(REDUCE, ranks=(0, 4))
    assert find_mismatches({0: [REDUCE, alone], 1: [REDUCE]}) == []


def test_the_root_of_a_gather_has_the_tensors_of_all():
    gather = replace(REDUCE, kind="gather_", count=8)
    assert find_mismatches({0: [gather], 1: [replace(gather, count=16)]}) == []


def test_what_is_sent_must_be_awaited():
    assert find_mismatches({0: [SEND], 2: [RECEIVE]}) == []
    (found,) = find_mismatches({0: [SEND, SEND], 2: [RECEIVE]})
    assert "transfer 2 from rank 0 to rank 2" in found
    (found,) = find_mismatches({0: [SEND], 2: [replace(RECEIVE, count=8)]})
    assert "awaited recv_ of 8" in found


def test_the_calls_within_a_collective_of_objects_count_as_one():
    log = CollectiveLog()
    with log.as_one(replace(REDUCE, kind="object:all_gather_object")):
        log.add(REDUCE)
    log.add(REDUCE)
    assert [call.kind for call in log.calls] == ["object:all_gather_object", "allreduce_"]


def test_calls_are_counted_by_kind_group_and_dtype():
    assert count_by_kind([REDUCE, REDUCE, SEND]) == {
        ("allreduce_", 2, "float32"): (2, 64),
        ("send", 2, "bfloat16"): (1, 32),
    }
