"""The proposal: which layouts are tried, which one wins, and the words for it."""

import re
from dataclasses import replace

import pytest

from megatron_r1v2.config.choices import Fp8, Recompute
from megatron_r1v2.planning.hardware import HARDWARE
from megatron_r1v2.planning.memory import GIB, plan_memory
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.planning.roofline import step_time
from megatron_r1v2.planning.search import LayoutCandidate, propose_layout
from tests.planning.plans import ARCHITECTURE, HF_CONFIG, SMALL, plan_for, plan_of, small_work, workload

NARROW = {**HF_CONFIG, "text_config": {**HF_CONFIG["text_config"], "intermediate_size": 4 * 1600}}


def propose_small(gpus=2, limit=GIB, gpus_per_node=8, hardware=HARDWARE["a100"], **changes):
    work = small_work(**changes)
    return propose_layout(SMALL, work, hardware, gpus=gpus, gpus_per_node=gpus_per_node, limit=limit, mean_response=5)


def test_every_layout_that_divides_is_tried():
    # TP1 PP1 DP2; TP1 PP2 evenly or with 1 of 4 layers first; TP2: each with and without recomputation.
    proposal = propose_small()
    assert (proposal.tried, proposal.fitting) == (8, 8)
    assert proposal.best.layout.ranks == 2
    assert propose_small(gpus_per_node=1).tried == 6, "tensor parallelism stays in a node"
    # On 3 GPUs: one replica on each, or 3 stages, of which the first has 2 of 4 layers (1 leaves 3 for two).
    assert propose_small(gpus=3).tried == 2
    # An H100 tries 8-bit products too, but only in place of bf16.
    assert propose_small(hardware=HARDWARE["h100"]).tried == 8


def test_a_candidate_is_named_and_set_by_its_layout():
    memory, time = propose_small().best.memory, propose_small().best.time
    candidate = LayoutCandidate(
        Layout(tensor=2, pipeline=3, data=4, first_stage_layers=5, sequence=True),
        Recompute.full,
        Fp8.tensorwise,
        True,
        48,
        memory,
        time,
    )
    assert candidate.name == "TP2 PP3 DP4, recompute full, FP8 tensorwise, 5 layers on the first stage"
    assert candidate.settings == (
        "parallel.tensor=2",
        "parallel.pipeline=3",
        "parallel.sequence=true",
        "parallel.first_stage_layers=5",
        "train.recompute=full",
        "train.tokens_per_microbatch=48",
        "model.layers=te",
        "model.fp8=tensorwise",
        "model.fp8_weights=true",
    )
    plain = replace(candidate, layout=Layout(), recompute=Recompute.none, fp8=Fp8.none, fp8_weights=False)
    assert plain.name == "TP1 PP1 DP1, recompute none"
    assert "model.layers=te" not in plain.settings


def test_the_reason_names_the_runner_up_and_what_is_too_big():
    everything = propose_small(gpus=4)
    assert f"the shortest of {everything.fitting} that fit, out of {everything.tried} tried" in everything.reason
    assert re.search(r"Next: TP\d PP\d DP\d, recompute \w+.*, \d+% slower\.", everything.reason)
    assert "would be faster" not in everything.reason
    tight = propose_small(gpus=4, limit=everything.best.memory.peak.total - 1)
    assert tight.best is None or f"{everything.best.name} would be faster but needs" in tight.reason


def test_what_stands_in_the_way_is_said_when_nothing_fits():
    nothing = propose_small(limit=1000)
    assert (nothing.best, nothing.fitting, nothing.tried) == (None, 0, 8)
    assert nothing.reason.startswith("nothing fits: the smallest of 8, ")
    none_divides = propose_small(kv_cache_gib=0.0)
    assert (none_divides.best, none_divides.tried) == (None, 0)
    assert none_divides.reason.startswith("no layout divides the model")


def test_the_proposal_is_the_fastest_that_fits():
    work = workload()
    proposal = propose_layout(
        ARCHITECTURE, work, HARDWARE["h100"], gpus=16, gpus_per_node=8, limit=76 * GIB, mean_response=4096
    )
    best = proposal.best
    assert best.layout.ranks == 16
    assert best.layout.tensor <= 8
    assert best.memory.peak.total <= 76 * GIB
    chosen = replace(
        work,
        recompute=best.recompute,
        fp8=best.fp8,
        fp8_weights=best.fp8_weights,
        packed_tokens=best.packed_tokens,
    )
    again = step_time(ARCHITECTURE, best.layout, chosen, HARDWARE["h100"], mean_response=4096)
    assert again == best.time
    for tensor, data in ((8, 2), (4, 4)):
        layout = Layout(tensor, 1, data, sequence=True)
        for recompute in (Recompute.none, Recompute.full):
            tried = replace(work, recompute=recompute)
            if plan_memory(ARCHITECTURE, layout, tried).peak.total <= 76 * GIB:
                time = step_time(ARCHITECTURE, layout, tried, HARDWARE["h100"], mean_response=4096)
                assert time.total >= best.time.total
    # What it proposes is accepted as a recipe, and fits.
    assert plan_of(*best.settings, gpus=16).fits


def test_fp8_is_proposed_where_the_gpu_has_it_and_the_price_is_said():
    arguments = {"gpus": 8, "gpus_per_node": 8, "limit": 76 * GIB, "mean_response": 4096}
    hopper = propose_layout(ARCHITECTURE, workload(), HARDWARE["h100"], **arguments)
    assert hopper.best.fp8 is Fp8.tensorwise
    assert hopper.best.fp8_weights
    assert re.search(r"In bf16 the best is TP2 PP1 DP4, recompute full, \d+% slower", hopper.reason)
    ampere = propose_layout(ARCHITECTURE, workload(), HARDWARE["a100"], **arguments)
    assert ampere.best.fp8 is Fp8.none
    with pytest.raises(ValueError, match="model.fp8=tensorwise, but A100 SXM 80 GB has no FP8 products"):
        step_time(ARCHITECTURE, Layout(8), replace(workload(), fp8=Fp8.tensorwise), HARDWARE["a100"], mean_response=9)
    # 1,600 feed-forward channels a rank are a multiple of 16 but not of 128.
    with pytest.raises(ValueError, match="blockwise needs a multiple of 128"):
        plan_for(NARROW, "model.layers=te", "model.fp8=blockwise", "parallel.tensor=4", "parallel.sequence=true")


def test_less_memory_makes_the_proposal_split_or_recompute_more():
    def best(gib):
        return propose_layout(
            ARCHITECTURE, workload(), HARDWARE["h100"], gpus=8, gpus_per_node=8, limit=gib * GIB, mean_response=4096
        ).best

    assert best(50).layout.tensor > best(76).layout.tensor
    assert best(50).recompute is Recompute.full
    assert best(50).time.total > best(76).time.total
