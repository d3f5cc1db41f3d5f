"""The line from rehearsals of few layers to all of them; and every recipe of the 38B model on its cluster by it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from benchmarks.plan_vs_rehearsal import (
    LINE,
    RECIPES,
    Case,
    compare,
    extend,
    fullest_phases,
    recipe_cases,
    rehearse_all,
)
from megatron_r1v2.rehearsal.few_layers import Layers, Line
from megatron_r1v2.rehearsal.ledger import PhaseMemory
from megatron_r1v2.rehearsal.run import Rehearsal
from tests.planning.plans import check_planned
from tests.rehearsal.tiny_rehearsal import RECIPES as FOLDER


def test_no_recipe_is_forgotten() -> None:
    assert sorted(RECIPES) == sorted(path.stem for path in FOLDER.glob("*.yaml"))


def check_runs(found: Rehearsal) -> None:
    """Check that all ranks fit together and fit."""
    assert not found.mismatches
    assert not found.too_full


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_with_few_layers_and_fits_on_the_line_to_all_as_planned(name: str) -> None:
    cases = recipe_cases(FOLDER, name)
    few, more = (rehearse_all(case) for case in cases)
    for found in (few, more):
        check_runs(found)
    for low, high in zip(few.ranks, more.ranks, strict=True):
        peaks = LINE.peaks(low.phases, high.phases)
        assert max(peak for _, peak in peaks) <= few.plan.cluster.limit, peaks
        layout = few.plan.layout
        assert max(peak for _, peak in peaks) > 2 * 38e9 / layout.tensor / layout.pipeline, "less than its weights"
    low, high = (compare(case, fullest_phases(found)) for case, found in zip(cases, (few, more), strict=True))
    check_planned([*low, *high, *extend(low, high)])


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_and_fits_with_all_layers_as_planned(name: str) -> None:
    case = Case(FOLDER / f"{name}.yaml", (), LINE.whole)
    found = rehearse_all(case)
    check_runs(found)
    check_planned(compare(case, fullest_phases(found)))


@cache
def of_grpo(layers: Layers) -> Rehearsal:
    few, _ = recipe_cases(FOLDER, "grpo")
    return rehearse_all(replace(few, layers=layers))


@pytest.mark.slow
def test_a_third_layer_count_lies_on_the_line() -> None:
    """Check on fewer layers, where it can be looked at, what the line says of all."""
    few, more, third = (of_grpo(layers).ranks[0] for layers in (LINE.few, LINE.more, Layers(7, 7)))
    line = Line(LINE.few, LINE.more, Layers(7, 7))
    for (name, peak), phase in zip(line.peaks(few.phases, more.phases), third.phases, strict=True):
        assert peak == pytest.approx(phase.peak, rel=0.01), name
    for phase, flops in third.flops.items():
        assert line.extend(few.flops[phase], more.flops[phase]) == pytest.approx(flops, rel=0.01), phase


def test_the_counts_of_the_38b_model_lie_on_a_line_with_all_its_layers() -> None:
    assert Line(Layers(3, 1), Layers(5, 4), Layers(45, 64)) == LINE


@pytest.mark.parametrize("whole", [Layers(45, 64), Layers(24, 28), Layers(4, 4), Layers(48, 80), Layers(2, 3)])
def test_two_counts_lie_on_a_line_with_the_third(whole: Layers) -> None:
    line = Line.through(whole)
    assert 0 < line.few.vision < line.more.vision <= whole.vision
    assert 0 < line.few.language < line.more.language <= whole.language
    # Three bytes a layer of the tower, five of the language model, seven beside.
    few, more, all_of_it = (3 * each.vision + 5 * each.language + 7 for each in (line.few, line.more, whole))
    assert line.extend(few, more) == pytest.approx(all_of_it)


def test_layers_are_read_and_given_without_changing_the_configuration() -> None:
    config = {"vision_config": {"num_hidden_layers": 45}, "text_config": {"num_hidden_layers": 64, "vocab_size": 9}}
    assert Layers.of(config) == Layers(45, 64)
    changed = Layers(3, 1).given_to(config)
    assert (Layers.of(changed), Layers.of(config)) == (Layers(3, 1), Layers(45, 64))
    assert changed["text_config"]["vocab_size"] == 9


def test_phases_that_differ_are_no_line() -> None:
    line = Line(Layers(1, 1), Layers(2, 2), Layers(5, 5))
    few, more = [PhaseMemory("load", 0, 10), PhaseMemory("update", 0, 30)], [PhaseMemory("load", 0, 14)]
    with pytest.raises(ValueError, match=r"phases differ: \['load', 'update'\] with Layers"):
        line.peaks(few, more)
    assert line.peaks(few, [*more, PhaseMemory("update", 0, 31)]) == [("load", 26), ("update", 34)]
