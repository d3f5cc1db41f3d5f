import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.data.packing import PromptLengths, first_fit_decreasing, nemo_first_fit_decreasing, share_prompts

LENGTHS = st.lists(st.integers(1, 60), max_size=40).map(lambda sizes: {f"s{i:02d}": n for i, n in enumerate(sizes)})


def test_by_hand():
    lengths = {"a": 3, "b": 7, "c": 5, "d": 4, "e": 1}
    assert first_fit_decreasing(lengths, 10) == [["b", "a"], ["c", "d", "e"]]


@given(LENGTHS, st.integers(60, 200))
def test_every_sequence_is_in_one_row_and_no_row_is_over_full(lengths, capacity):
    rows = first_fit_decreasing(lengths, capacity)
    assert sorted(name for row in rows for name in row) == sorted(lengths)
    assert all(sum(lengths[name] for name in row) <= capacity for row in rows)
    # No row could have been saved by moving all of a later row into an earlier one's room.
    used = [sum(lengths[name] for name in row) for row in rows]
    assert all(used[i] + min(lengths[n] for n in rows[j]) > capacity for j in range(len(rows)) for i in range(j))


def test_a_sequence_longer_than_a_row_gets_its_own():
    assert first_fit_decreasing({"a": 12, "b": 3}, 10) == [["a"], ["b"]]


def test_shared_prompts_by_hand():
    # The first prompt with 4 + 3 + 2 of its responses fills a row of 12; the rest needs it once more.
    groups = [
        PromptLengths(3, {"a": 4, "b": 3, "c": 2, "d": 2}),
        PromptLengths(5, {"e": 1}),
        PromptLengths(9, {"f": 8}),
    ]
    assert share_prompts(groups, 12) == [["f"], ["a", "b", "c"], ["e", "d"]]
    assert share_prompts(groups, 14) == [["f"], ["a", "b", "c", "d"], ["e"]]
    assert share_prompts([], 12) == []


@given(
    st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(1, 30), min_size=1, max_size=6)), max_size=8),
    st.integers(40, 120),
)
def test_shared_prompts_fill_rows_with_their_prompt_counted_once(lengths, capacity):
    groups = [
        PromptLengths(prompt, {f"{index}/{number}": size for number, size in enumerate(responses)})
        for index, (prompt, responses) in enumerate(lengths)
    ]
    rows = share_prompts(groups, capacity)
    assert sorted(name for row in rows for name in row) == sorted(name for group in groups for name in group.responses)
    for row in rows:
        keys = [int(name.split("/")[0]) for name in row]
        runs = [key for key, _ in itertools.groupby(keys)]
        assert len(runs) == len(set(runs)), "the responses to a prompt are neighbours"
        tokens = sum(groups[key].prompt for key in runs) + sum(
            groups[key].responses[name] for key, name in zip(keys, row, strict=True)
        )
        assert tokens <= capacity or len(row) == 1


@settings(deadline=None)  # the first example imports NeMo
@given(LENGTHS, st.integers(60, 200))
def test_nemo_agrees(lengths, capacity):
    pytest.importorskip("nemo.utils.sequence_packing_utils", reason="the nemo extra is not installed")
    assert nemo_first_fit_decreasing(lengths, capacity) == first_fit_decreasing(lengths, capacity)


def test_nemo_refuses_a_sequence_longer_than_a_row():
    pytest.importorskip("nemo.utils.sequence_packing_utils", reason="the nemo extra is not installed")
    with pytest.raises(ValueError, match="tokens_per_microbatch=10"):
        nemo_first_fit_decreasing({"a": 12}, 10)
