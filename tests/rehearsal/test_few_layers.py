"""The line from rehearsals of few layers to all of them; and every recipe of the 38B model on its cluster by it."""

from __future__ import annotations

from functools import cache

import pytest

from megatron_r1v2.checkpoint.hf.config import sizes_config
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.planning.known_models import KNOWN_MODELS
from megatron_r1v2.planning.plan import Cluster, make_plan
from megatron_r1v2.planning.scale_page import read_cluster
from megatron_r1v2.rehearsal.few_layers import Layers, Line
from megatron_r1v2.rehearsal.ledger import PhaseMemory
from megatron_r1v2.rehearsal.run import Rehearsal, rehearse
from tests.rehearsal.tiny_rehearsal import RECIPES

RESERVE_GIB = 4.0
"""Of each GPU, for what is no tensor: the default of `r1v2 rehearse`."""
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
LINE = Line.through(Layers.of(KNOWN_MODELS["r1v2-38b"]))


def rehearsed(name: str, layers: Layers) -> Rehearsal:
    """Rehearse a recipe with so many layers on the cluster of its header."""
    path = RECIPES / f"{name}.yaml"
    gpus, hardware = read_cluster(path)
    model = "internvl3-38b" if "internvl3" in name else "r1v2-38b"
    config = sizes_config(layers.given_to(KNOWN_MODELS[model]))
    cluster = Cluster(gpus, min(gpus, 8), hardware.memory_gib, RESERVE_GIB, hardware)
    recipe = load_recipe(path)
    return rehearse(recipe, config, make_plan(recipe, config, cluster), hf_path=None, all_ranks=False, own_data=False)


def check_runs(found: Rehearsal) -> None:
    """Check that all ranks ran to their end, fit together and fit."""
    errors = [f"{rank.place}, {rank.error_phase}: {rank.error}" for rank in found.ranks if rank.error]
    assert not errors, "\n".join(errors)
    assert not found.mismatches
    assert not found.too_full


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_runs_and_the_line_through_two_layer_counts_fits(name: str) -> None:
    few, more = (rehearsed(name, layers) for layers in (LINE.few, LINE.more))
    for found in (few, more):
        check_runs(found)
    for low, high in zip(few.ranks, more.ranks, strict=True):
        peaks = LINE.peaks(low.phases, high.phases)
        assert max(peak for _, peak in peaks) <= few.plan.cluster.limit, peaks
        layout = few.plan.layout
        assert max(peak for _, peak in peaks) > 2 * 38e9 / layout.tensor / layout.pipeline, "less than its weights"


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_runs_and_fits_with_all_layers(name: str) -> None:
    check_runs(rehearsed(name, LINE.whole))


@cache
def of_grpo(layers: Layers) -> Rehearsal:
    return rehearsed("grpo", layers)


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
