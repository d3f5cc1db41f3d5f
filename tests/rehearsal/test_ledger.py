"""The bytes of live tensors: what holds them, the peak of a phase and its line."""

import gc

import pytest
import torch

from megatron_r1v2.rehearsal.ledger import ACTIVATIONS, KV_CACHE, PARAMETERS, MemoryLedger, phase_of


def made(ledger, elements, before=()):
    tensor = torch.zeros(elements)
    ledger.add([tensor], before)
    return tensor


def test_a_storage_counts_once_and_until_it_dies():
    ledger = MemoryLedger()
    tensor = made(ledger, 10)
    ledger.add([tensor.view(2, 5), tensor[3:]])
    assert ledger.held == 40
    view = tensor[:2]
    del tensor
    gc.collect()
    assert ledger.held == 40, "a view keeps the whole storage"
    del view
    gc.collect()
    assert ledger.held == 0


def test_an_input_is_not_new():
    ledger = MemoryLedger()
    outside = torch.zeros(10)
    ledger.add([outside.view(5, 2)], before=[outside])
    assert ledger.held == 0


def test_the_peak_of_a_phase_is_its_fullest_moment_with_all_that_was_held_before():
    ledger = MemoryLedger()
    weights = made(ledger, 100)
    with ledger.phase("step") as phase:
        temporary = made(ledger, 50)
        del temporary
        gc.collect()
        kept = made(ledger, 10)
    assert (phase.held_before, phase.peak, phase.held_after) == (400, 600, 440)
    del weights, kept


def test_phases_lie_in_each_other():
    ledger = MemoryLedger()
    with ledger.phase("outer") as outer, ledger.phase("inner") as inner:
        assert ledger.current_phase == "inner"
        tensor = made(ledger, 10)
    assert outer.peak == inner.peak == 40
    assert ledger.current_phase == "start"
    del tensor


def test_a_phase_begins_without_garbage():
    ledger = MemoryLedger()
    held = [made(ledger, 10)]
    held.append(held)
    gc.disable()
    try:
        del held
        assert ledger.held == 40, "the list holds itself"
        with ledger.phase("step") as phase:
            assert ledger.held == 0
        assert phase.held_before == 0
    finally:
        gc.enable()


def test_a_phase_alone_is_no_part_of_the_one_around_it():
    ledger = MemoryLedger()
    with ledger.phase("save") as outer:
        with ledger.phase("load", alone=True) as inner:
            tensor = made(ledger, 10)
            del tensor
            gc.collect()
        assert ledger.current_phase == "save"
    assert (outer.peak, inner.peak) == (0, 40)


def test_categories_are_those_of_the_block_or_are_assigned_later():
    ledger = MemoryLedger()
    with ledger.holding(PARAMETERS):
        weights = made(ledger, 10)
    cache = made(ledger, 20)
    assert ledger.by_category == {PARAMETERS: 40, ACTIVATIONS: 80}
    ledger.assign([cache], KV_CACHE)
    assert ledger.by_category == {PARAMETERS: 40, ACTIVATIONS: 0, KV_CACHE: 80}
    with ledger.phase("later") as phase:
        more = made(ledger, 1)
    assert phase.at_peak == {PARAMETERS: 40, ACTIVATIONS: 4, KV_CACHE: 80}
    del cache, weights, more
    gc.collect()
    assert not any(ledger.by_category.values())


def test_the_course_is_thinned_out_and_keeps_its_end():
    ledger = MemoryLedger()
    with ledger.phase("many"):
        for _ in range(6000):
            made(ledger, 10)
    assert len(ledger.samples) <= 2000
    assert ledger.samples[-1].held == {ACTIVATIONS: 0}


def test_flops_belong_to_the_innermost_phase():
    ledger = MemoryLedger()
    ledger.add_flops(1)
    with ledger.phase("outer") as outer:
        ledger.add_flops(2)
        with ledger.phase("inner") as inner:
            ledger.add_flops(5)
    assert (outer.flops, inner.flops) == (2, 5)


def test_what_is_named_later_has_its_name_in_the_peak_too():
    ledger = MemoryLedger()
    with ledger.phase("gate") as phase:
        cache = made(ledger, 100)
        temporary = made(ledger, 50)
        del temporary
        gc.collect()
        later = made(ledger, 20)
        ledger.assign([cache, later], KV_CACHE)
    assert phase.at_peak == {ACTIVATIONS: 200, KV_CACHE: 400}, "what was made behind the peak is no part of it"
    assert ledger.by_category == {ACTIVATIONS: 0, KV_CACHE: 480}


def raised_in_update(ledger):
    with ledger.phase("step"):
        with ledger.phase("gate"):
            pass
        with ledger.phase("update"):
            raise RuntimeError("first")


def saved_meanwhile(ledger):
    """Run a phase while an exception is on its way out, as a run that saves before it ends."""
    try:
        raised_in_update(ledger)
    finally:
        with ledger.phase("save"):
            pass


def raised_again(ledger):
    with ledger.phase("around"):
        try:
            raised_in_update(ledger)
        except RuntimeError as error:
            raise ValueError("second") from error


def raised_between_phases(ledger):
    with ledger.phase("step"):
        with ledger.phase("gate"):
            pass
        raise RuntimeError("between")


@pytest.mark.parametrize(
    ("fail", "phase"),
    [
        (raised_in_update, "update"),
        (saved_meanwhile, "update"),
        (raised_again, "update"),
        (raised_between_phases, "step"),
    ],
)
def test_an_exception_names_the_innermost_phase_that_it_ended(fail, phase):
    with pytest.raises((RuntimeError, ValueError)) as raised:
        fail(MemoryLedger())
    assert phase_of(raised.value) == phase


def test_an_exception_outside_of_phases_has_none():
    assert phase_of(RuntimeError("outside")) == ""
