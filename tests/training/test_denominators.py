"""The factor undoes megatron-core's two divisions, by hand; tests/distributed does it with megatron-core itself."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.training.denominators import loss_scale


def test_by_hand():
    assert loss_scale(num_microbatches=1, data_size=1) == 1.0
    assert loss_scale(num_microbatches=3, data_size=4) == 12.0


@settings(deadline=None)
@given(losses=st.lists(st.lists(st.floats(-10, 10), min_size=1, max_size=6), min_size=1, max_size=5))
def test_what_arrives_at_the_optimizer_is_the_sum_over_ranks_and_microbatches(losses):
    """The schedule divides by the microbatches of the rank, DDP averages over the ranks."""
    arrived = sum(
        sum(loss * loss_scale(num_microbatches=len(rank), data_size=len(losses)) / len(rank) for loss in rank)
        for rank in losses
    ) / len(losses)
    assert arrived == pytest.approx(sum(sum(rank) for rank in losses), abs=1e-9)
