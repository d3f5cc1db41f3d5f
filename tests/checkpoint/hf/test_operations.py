"""The operations of the table: each undoes itself at every tensor-parallel size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.checkpoint.hf.operations import GroupedQKV, JoinedQKV, Replicated, Split, Stacked, padded_units


@settings(max_examples=60, deadline=None)
@given(
    operation=st.one_of(
        st.just(Replicated()),
        st.builds(Split, st.integers(0, 1), st.integers(1, 9), st.integers(1, 3), st.just(True)),
        st.builds(GroupedQKV, st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.just(True)),
        st.builds(Stacked, st.sampled_from([8, 16])),
    ),
    tensor_size=st.sampled_from([1, 2, 4, 8]),
    columns=st.integers(1, 4),
)
def test_every_operation_undoes_itself(operation, tensor_size, columns):
    tensors = hf_tensors(operation, columns)
    shards = [operation.to_shard(tensors, tensor_rank=rank, tensor_size=tensor_size) for rank in range(tensor_size)]
    assert len({shard.shape for shard in shards}) == 1
    again = operation.to_hf(shards)
    assert all(torch.equal(a, b) for a, b in zip(tensors, again, strict=True))


def test_a_split_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"parallel\.tensor=4"):
        Split(0, 6).to_shard([torch.zeros(6, 2)], tensor_rank=0, tensor_size=4)


def hf_tensors(operation, columns: int) -> list[torch.Tensor]:
    if isinstance(operation, Split):
        shape = [columns, columns]
        shape[operation.dim] = operation.num_units * operation.unit_size
        shapes = [shape]
    elif isinstance(operation, GroupedQKV):
        rows = operation.num_groups * operation.head_size
        shapes = [[rows * operation.queries_per_group, columns], [rows, columns], [rows, columns]]
    elif isinstance(operation, Stacked):
        shapes = [[operation.num_rows, columns]] * 2
    else:
        shapes = [[columns]]
    return [torch.randn(shape) for shape in shapes]


def rows(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.float32)[:, None]


def test_queries_keys_and_values_are_interleaved_by_group():
    """Two groups of two queries, heads of one row: [q q k v | q q k v]."""
    operation = GroupedQKV(num_groups=2, queries_per_group=2, head_size=1)
    query, key, value = rows(0, 4), rows(10, 2), rows(20, 2)
    whole = operation.to_shard([query, key, value], tensor_rank=0, tensor_size=1)
    assert whole.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    second = operation.to_shard([query, key, value], tensor_rank=1, tensor_size=2)
    assert second.flatten().tolist() == [2, 3, 11, 21]
    joined = JoinedQKV(operation)
    assert torch.equal(joined.to_shard([torch.cat([query, key, value])], tensor_rank=0, tensor_size=1), whole)
    assert torch.equal(torch.cat(operation.blocks([query, key, value])), whole)
    assert joined.to_hf([whole])[0].flatten().tolist() == [0, 1, 2, 3, 10, 11, 20, 21]
    assert [block.flatten().tolist() for block in operation.hf_blocks(whole)[0]] == [[0, 1], [2, 3]]
    assert torch.cat(joined.hf_blocks(whole)[0]).flatten().tolist() == [0, 1, 2, 3, 10, 11, 20, 21]


def test_stacked_matrices_are_each_split():
    operation = Stacked(4)
    shards = [operation.to_shard([rows(0, 4), rows(10, 4)], tensor_rank=rank, tensor_size=2) for rank in (0, 1)]
    assert [shard.flatten().tolist() for shard in shards] == [[0, 1, 10, 11], [2, 3, 12, 13]]
    assert [tensor.flatten().tolist() for tensor in operation.to_hf(shards)] == [[0, 1, 2, 3], [10, 11, 12, 13]]


def test_padding_is_zeros_at_the_end_and_is_cut_off_again():
    operation = Split(0, num_units=3, unit_size=2, padded=True)
    shards = [operation.to_shard([rows(1, 6)], tensor_rank=rank, tensor_size=2) for rank in (0, 1)]
    assert [shard.flatten().tolist() for shard in shards] == [[1, 2, 3, 4], [5, 6, 0, 0]]
    assert padded_units(25, 8) == 32
    assert operation.to_hf(shards)[0].flatten().tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("operation", "tensors", "told"),
    [
        (Split(0, 3), [rows(0, 4)], "has 4 entries, config.json implies 3"),
        (GroupedQKV(2, 1, 1), [rows(0, 2), rows(0, 3), rows(0, 2)], "has 3 rows, config.json implies 2"),
        (JoinedQKV(GroupedQKV(2, 1, 1)), [rows(0, 7)], "has 7 rows, config.json implies 6"),
    ],
)
def test_other_sizes_are_refused(operation, tensors, told):
    with pytest.raises(ValueError, match=told):
        operation.to_shard(tensors, tensor_rank=0, tensor_size=1)
