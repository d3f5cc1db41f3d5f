"""Tensors without memory that know small values; here on the CPU, so that nothing has to be replaced."""

import pytest
import torch

from megatron_r1v2.rehearsal.fake_tensors import FakeTensors, UnknownValues, values_of

LARGE = 100_000
"""More floats than are known."""


@pytest.fixture
def mode():
    with FakeTensors("cpu") as entered, entered.phase("test"):
        yield entered


def test_small_values_are_computed_and_large_ones_are_not(mode):
    numbers = torch.arange(6) * 2
    assert values_of(numbers).tolist() == [0, 2, 4, 6, 8, 10]
    assert int(numbers.sum()) == 30
    assert values_of(torch.zeros(LARGE)) is None
    assert not mode.questions


def test_memory_that_nobody_has_written_is_zero(mode):
    known = torch.ones(3)
    torch.use_deterministic_algorithms(True)  # where torch fills it with NaN, and with the largest integers
    try:
        made = [torch.empty(3), torch.empty_like(known), known.new_empty(3), torch.empty(3, dtype=torch.int64)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert [values_of(each).tolist() for each in made] == 4 * [[0, 0, 0]]


def test_bytes_are_counted_that_nobody_has(mode):
    huge = torch.empty(2**40)
    assert mode.ledger.held == 2**42
    del huge
    assert mode.ledger.held == 0


def test_views_see_what_is_written_in_place(mode):
    table = torch.zeros(4, 4, dtype=torch.int32)
    table[1, 2:] = torch.tensor([7, 8], dtype=torch.int32)
    assert values_of(table).tolist()[1] == [0, 0, 7, 8]
    assert values_of(table[1])[2:].tolist() == [7, 8]


def test_an_unknown_number_is_answered_by_a_rule_and_noted(mode):
    total = torch.zeros(LARGE).sum()
    assert float(total) == 1.0
    assert bool(torch.isfinite(torch.zeros(LARGE)).all())
    assert {rule for rule, _ in mode.questions} == {"an unknown number: 1", "an unknown condition: true"}


def test_unknown_numbers_that_cover_a_tensor_make_it_unknown(mode):
    weight = torch.ones(10)
    view = weight[:2]
    weight.copy_(torch.zeros(LARGE)[:10])
    assert values_of(weight) is None
    assert values_of(view) is None


def test_unknown_numbers_in_a_part_are_zeros(mode):
    drawn = torch.ones(2, 3, dtype=torch.float64)
    drawn[1] = torch.zeros(LARGE, dtype=torch.float64)[:3]
    assert values_of(drawn).tolist() == [[1, 1, 1], [0, 0, 0]]
    assert any("zeros" in rule for rule, _ in mode.questions)


def test_shapes_that_depend_on_known_values_are_right(mode):
    mask = torch.arange(5) > 2
    assert mask.nonzero().shape == (2, 1)
    assert torch.arange(5)[mask].shape == (2,)
    with pytest.raises(UnknownValues, match="unknown values"):
        (torch.zeros(LARGE) > 0).nonzero()
    with pytest.raises(UnknownValues, match="a mask of unknown values"):
        torch.zeros(LARGE)[torch.zeros(LARGE) > 0]


def test_real_tensors_enter_with_their_values():
    real = torch.tensor([3, 4])
    with FakeTensors("cpu"):
        assert values_of(real + 1).tolist() == [4, 5]


def test_a_backward_pass_has_gradients_and_peaks(mode):
    weight = torch.zeros(LARGE, requires_grad=True)
    (weight * 2).sum().backward()
    assert weight.grad.shape == weight.shape


def test_data_of_another_shape_forgets_the_values(mode):
    tensor = torch.zeros(1)
    tensor.data = torch.zeros(3)
    assert values_of(tensor) is None


def test_bookkeeping_on_known_values_is_what_fakes_would_say(mode, monkeypatch):
    """Every operator gives the same shapes, strides, dtypes, devices, bytes and values without torch's fakes."""

    def run():
        table = torch.zeros(6, 4, dtype=torch.int32)
        table[1, 2:] = torch.tensor([7, 8], dtype=torch.int32)
        table[table == 7] = 5
        column = table.t()[2]
        results = [table + 1, table.t() * 2.5, column.cumsum(0), table[torch.tensor([1, 0])], table.float().mean()]
        column.add_(1)
        results += [torch.cat([table, table]), torch.where(table > 1, table, 0), table.argsort(1), column.clone()]
        results += [table.repeat(3, 1), torch.ones_like(table), table.to(torch.float16), table.max()]
        return [
            (
                values_of(each).tolist(),
                each.shape,
                each.stride(),
                each.dtype,
                each.device,
                each.untyped_storage().nbytes(),
            )
            for each in results
        ]

    fast, held = run(), mode.ledger.held
    monkeypatch.setattr(mode, "_run_bookkeeping", lambda *_: None)
    slow = run()
    assert fast == slow
    assert held == mode.ledger.held == 0
    assert mode.ledger.phases[0].peak > 0


def test_bookkeeping_on_two_devices_is_refused_as_always(mode):
    elsewhere = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError, match="at least two devices"):
        torch.ones(3) + elsewhere
