"""Activations: what the planner says against what was measured, then and now."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1v2.config.schema import ParallelConfig, Part, Recompute
from megatron_r1v2.models.architecture import LanguageArchitecture, R1V2Architecture, VisionArchitecture
from megatron_r1v2.planning.activations import ActivationModel, MicrobatchShape
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.planning.passes import log_probs_peak, training_peak, vision_peak
from tests.planning.plans import SMALL
from tests.ranks import run_ranks

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "planner_activations_cpu.json"
TOLERANCE = 0.10


def measured_cases():
    """Return each rank of each measured case."""
    cases = json.loads(RESULTS.read_text())["cases"]
    return [
        pytest.param(case, rank, id=f"{case['name']}, rank {rank}")
        for case in cases
        for rank in range(len(case["measured"]))
    ]


def architecture_of(saved):
    vision = {**saved["vision"], "pixel_mean": tuple(saved["vision"]["pixel_mean"])}
    return R1V2Architecture(
        **{
            **saved,
            "vision": VisionArchitecture(**vision),
            "language": LanguageArchitecture(**saved["language"]),
        }
    )


def model_of(case):
    parallel = case["parallel"]
    layout = Layout(parallel["tensor"], parallel["pipeline"], 1, parallel["first_stage_layers"], parallel["sequence"])
    return ActivationModel(
        architecture_of(case["architecture"]),
        layout,
        [Part(part) for part in case["parts"]],
        2 if case["precision"] == "bf16" else 4,
        Recompute(case["recompute"]),
    )


@pytest.mark.parametrize(("case", "rank"), measured_cases())
def test_the_plan_is_within_a_tenth_of_what_was_measured(case, rank):
    model = model_of(case)
    rows, tokens = (1, case["rows"] * case["tokens"]) if case["packed"] else (case["rows"], case["tokens"])
    batch = MicrobatchShape(rows, tokens, case["rows"] * case["tiles"])
    stage = rank // case["parallel"]["tensor"]
    training = training_peak(model, batch, stage=stage, microbatches=case["microbatches"])
    assert training == pytest.approx(case["measured"][rank]["training"], rel=TOLERANCE)
    log_probs = log_probs_peak(model, batch, stage=stage)
    assert log_probs == pytest.approx(case["measured"][rank]["log_probs"], rel=TOLERANCE)


def test_a_step_measured_now_is_within_a_tenth_of_the_plan():
    from benchmarks.planner_activations import SMALL, Case, measure_rank, planned

    case = Case("now", SMALL, ParallelConfig(), ("adapter",), "bf16", "full", 1, 256, 2)
    (measured,) = run_ranks(1, measure_rank, case)
    assert measured == pytest.approx(planned(case, 0), rel=TOLERANCE)


def small_model(**changes):
    case = json.loads(RESULTS.read_text())["cases"][0]
    return replace(model_of(case), **changes)


def test_more_recomputation_keeps_less_and_more_rows_keep_more():
    batch = MicrobatchShape(1, 4096, 2)
    peaks = [
        training_peak(small_model(recompute=recompute), batch, stage=0, microbatches=1)
        for recompute in (Recompute.full, Recompute.selective, Recompute.none)
    ]
    assert peaks[0] < peaks[1] < peaks[2]
    assert training_peak(small_model(), replace(batch, rows=2, tiles=4), stage=0, microbatches=1) > 1.9 * peaks[2]


def test_earlier_pipeline_stages_hold_more_microbatches():
    model = small_model(layout=Layout(pipeline=3))
    batch = MicrobatchShape(1, 4096, 0)
    one = small_model(layout=Layout(pipeline=3), parts=[Part.language])
    peaks = [training_peak(one, batch, stage=stage, microbatches=8) for stage in range(2)]
    assert peaks[0] > 1.4 * peaks[1]
    assert training_peak(one, batch, stage=0, microbatches=1) < peaks[0] / 2
    # Text alone has no gradient when the adapter trains: no stage keeps anything.
    assert training_peak(model, batch, stage=1, microbatches=8) == log_probs_peak(model, batch, stage=1)


def test_the_vision_tower_encodes_32_tiles_at_once_while_it_is_frozen():
    frozen, trained = small_model(), small_model(parts=[Part.vision])
    assert vision_peak(frozen, 0) == 0
    features, pixels = 32 * 16 * 640 * 4, 32 * 3 * 112**2  # of 32 more tiles
    assert vision_peak(frozen, 64) - vision_peak(frozen, 32) == features + pixels
    # Where the features of so many tiles outgrow a pass, they are there twice: together, and copied for each prompt.
    assert vision_peak(frozen, 6400) - vision_peak(frozen, 6368) == 2 * features + pixels
    assert vision_peak(trained, 64) == 2 * vision_peak(trained, 32)


BATCH = MicrobatchShape(rows=2, tokens=8, tiles=1)
# Of SMALL in fp32, worked out tensor by tensor in test_activations.py.
LAYER_SAVED, LAYER_FORWARD, LAYER_BACKWARD, HIDDEN = 15_616, 14_336, 6_144, 1_024
ROTARY = 8 * 4 * 4
HEAD = HIDDEN + 2 * 4 * 16 * 64
"""The norm's input, the softmax and its gradient."""


def hand_model(*, recompute=Recompute.none, vocabulary=64, **layout):
    sizes = replace(SMALL, language=replace(SMALL.language, vocab_size=vocabulary))
    return ActivationModel(sizes, Layout(**layout), [Part.adapter], 4, recompute)


def test_a_pass_without_a_graph_peaks_in_a_layer_or_in_the_head():
    of_image = 1 * (32 + 16) * 4  # a token of features, and its embedding
    assert log_probs_peak(hand_model(), BATCH, stage=0) == LAYER_FORWARD + ROTARY + of_image
    logits = 16 * 4096
    many_words = hand_model(vocabulary=4096)
    # The float32 softmax and what it is made of, beside the stage's input: the gathered hidden states are gone by then.
    assert log_probs_peak(many_words, BATCH, stage=0) == 2 * 4 * logits + HIDDEN
    first = hand_model(vocabulary=4096, pipeline=2)
    beside = HIDDEN  # the output of the microbatch before
    assert log_probs_peak(first, BATCH, stage=0) == LAYER_FORWARD + ROTARY + of_image + beside, "no head here"
    assert log_probs_peak(hand_model(), replace(BATCH, tiles=0), stage=0) == LAYER_FORWARD + ROTARY
    tiles = replace(BATCH, rows=1, tokens=8, tiles=32)
    assert log_probs_peak(hand_model(), tiles, stage=0) == vision_peak(hand_model(), 32) == 32 * (48 + 640 + 1_440)


def test_a_training_pass_by_hand():
    adapter = 384
    kept = 4 * LAYER_SAVED + adapter
    assert training_peak(hand_model(), BATCH, stage=0, microbatches=1) == kept + HEAD
    full = hand_model(recompute=Recompute.full)
    # Only inputs of layers are kept; one layer at a time is computed again, on top of its input.
    inputs = 4 * HIDDEN + ROTARY + adapter
    again = LAYER_SAVED - HIDDEN + LAYER_BACKWARD + HIDDEN
    assert training_peak(full, BATCH, stage=0, microbatches=1) == inputs + again


def test_a_pipeline_keeps_a_microbatch_for_each_stage_behind():
    model = hand_model(pipeline=2)
    first = 2 * LAYER_SAVED + 2 * HIDDEN + 384
    last = 2 * LAYER_SAVED + 2 * HIDDEN
    backward = LAYER_BACKWARD + HIDDEN
    assert training_peak(model, BATCH, stage=0, microbatches=3) == first + first + backward
    assert training_peak(model, BATCH, stage=0, microbatches=1) == first + backward
    assert training_peak(model, BATCH, stage=1, microbatches=3) == last + HEAD
