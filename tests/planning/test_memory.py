"""Memory of a rank: caches, microbatches and buffers by hand, and limits that are limits."""

from dataclasses import replace

import pytest

from megatron_r1v2.config.choices import Fp8, Part, Recompute, StageName
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.generation.cache_size import working_bytes
from megatron_r1v2.planning.activations import ActivationModel
from megatron_r1v2.planning.memory import (
    GIB,
    _phase_load,
    fits,
    kv_bytes_per_token,
    kv_cache_bytes,
    largest_that_fits,
    plan_memory,
    prompt_feature_bytes,
)
from megatron_r1v2.planning.parameters import Layout, whole_model_counts
from megatron_r1v2.planning.passes import log_probs_peak, training_peak
from megatron_r1v2.planning.plan import make_plan
from megatron_r1v2.planning.state import largest_state
from megatron_r1v2.planning.workload import RehearsedStep, Workload
from tests.planning.plans import ARCHITECTURE, HF_CONFIG, RECIPE, SMALL, cluster, plan_of, small_work, workload


@pytest.mark.parametrize("packing", ["shared", "first_fit_decreasing"])
def test_each_limit_fits_and_a_little_more_does_not(packing):
    overrides = (f"train.packing={packing}", "train.tokens_per_microbatch=12288")
    limits = plan_of(*overrides).limits
    # Rows longer than a packed microbatch make it longer, so they are bounded alike.
    for setting, step in (("train.tokens_per_microbatch", 512), ("generation.max_response_tokens", 32)):
        largest = int(limits[setting])
        assert largest >= 1
        assert plan_of(*overrides, f"{setting}={largest}").fits
        assert not plan_of(*overrides, f"{setting}={largest + step}").fits
    requests = ("generation.max_requests=20000", "generation.max_tokens_per_step=20000")
    largest = limits["generation.kv_cache_gib"]
    assert plan_of(*overrides, f"generation.kv_cache_gib={largest}").fits
    assert largest > 30
    assert not plan_of(*overrides, *requests, f"generation.kv_cache_gib={largest + 0.25}").fits


def test_the_mpo_stage_has_two_responses_a_prompt_that_stay_together():
    separate = "train.packing=first_fit_decreasing"
    recipe = load_recipe(RECIPE, [separate])
    plan = make_plan(recipe, HF_CONFIG, cluster(), stage=StageName.mpo)
    assert [rank.phase for rank in plan.memory.ranks] == ["reference", "update", "evaluate"]
    assert plan.memory.host_buffer == plan.time.decode == plan.time.log_probs == 0
    assert plan.time.update == pytest.approx(plan_of(separate).time.update / 4, rel=1e-6)
    work = Workload.from_recipe(recipe, ARCHITECTURE, stage=StageName.mpo)
    assert work.microbatch(8).tokens == 2 * 12288, "a packed row of 12,288 tokens would hold one of the two"
    assert work.microbatch(8).tiles == 3 * 13, "the two share their tiles"
    shared = replace(work, shares_prompts=True).microbatch(8)
    assert shared.tokens == 12288 + work.response_tokens, "the prompt once"
    assert shared.tiles == shared.tokens // work.prompt_tokens * 13


def test_the_cache_is_what_its_requests_can_use_and_holds_at_least_one_sequence():
    layout = Layout(tensor=8)
    token = 64 * 1 * 2 * 128 * 2  # layers, heads of a rank, keys and values, channels, bf16
    one = workload("generation.max_requests=1")
    assert kv_cache_bytes(ARCHITECTURE, layout, one, 0) == (48 + 1) * 256 * token  # 12,288 tokens and a spare block
    with pytest.raises(ValueError, match="kv_cache_gib=0.1 does not hold one sequence of 12288"):
        kv_cache_bytes(ARCHITECTURE, layout, workload("generation.kv_cache_gib=0.1"), 0)
    # With fewer heads than ranks each rank still has one.
    assert kv_cache_bytes(ARCHITECTURE, Layout(tensor=20), one, 0) == (48 + 1) * 256 * token


def test_a_cache_that_takes_what_is_free_fills_the_fullest_gpu_and_no_more():
    plan = plan_of("generation.kv_cache_gib=auto", "generation.max_requests=400")
    (generate,) = (rank for rank in plan.memory.ranks if rank.phase == "generate")
    limit, block = plan.cluster.limit, 256 * 64 * 2 * 128 * 2
    assert plan.fits
    working = working_bytes(ARCHITECTURE, _phase_load(ARCHITECTURE, plan.layout, plan.work, 0, "generate"))
    rest = limit - generate.parameters - generate.gradients - generate.optimizer - generate.buffers - working
    assert rest - block <= generate.kv_cache <= rest + 2**21, "block tables, which are among the buffers, are small"
    beside = generate.activations + generate.image_features
    assert beside <= working, "the rule of the engine covers what the planner counts"
    assert any("kv_cache_gib=auto: " in note and f"{generate.kv_cache / GIB:.1f} GiB" in note for note in plan.notes)
    with pytest.raises(ValueError, match="kv_cache_gib=auto finds"):
        plan_of("generation.kv_cache_gib=auto", memory=20.0)


def test_the_stage_with_the_least_room_decides_the_blocks_of_all():
    work = workload("generation.kv_cache_gib=auto")
    layout = Layout(tensor=4, pipeline=2, sequence=True)
    first, second = (kv_cache_bytes(ARCHITECTURE, layout, work, stage) for stage in (0, 1))
    assert first == second, "as many layers, as many blocks"
    uneven = Layout(tensor=4, pipeline=2, sequence=True, first_stage_layers=24)
    first, second = (kv_cache_bytes(ARCHITECTURE, uneven, work, stage) for stage in (0, 1))
    assert first * 40 == second * 24


def test_image_features_stay_below_the_cache_limit_and_vanish_without_images():
    layout = Layout(tensor=8, data=2)
    work = replace(workload("generation.feature_cache_gib=1"), validated=8)
    first = plan_memory(ARCHITECTURE, layout, work).ranks
    features, embedding = 13 * 256 * 12800 * 2, 13 * 256 * 5120 * 2
    # 12 whole prompts fit below a GiB; 32 are in the engine at once, the last two
    # of which are encoded when memory is fullest.
    assert [rank.phase for rank in first] == ["gate", "generate", "update", "evaluate"]
    sizes = [0, (12 - 2) * features + 32 * embedding, 12 * features, 4 * features + 4 * embedding]
    assert [rank.image_features for rank in first][1:3] == sizes[1:3]
    assert first[3].image_features <= sizes[3], "those of a validation alone"
    text = replace(workload(), tiles=0)
    assert all(rank.image_features == 0 for rank in plan_memory(ARCHITECTURE, layout, text).ranks)
    ranks = plan_memory(ARCHITECTURE, Layout(tensor=4, pipeline=2), workload()).ranks
    later = [rank for rank in ranks if rank.stage == 1]
    assert all(rank.image_features == 0 and rank.gradients == 0 for rank in later)


def test_rows_are_padded_to_whole_blocks_of_eight_and_of_the_ranks():
    work = small_work()  # 10 + 7 tokens, of which the last is a label only
    assert [work.row_tokens(tensor) for tensor in (1, 2, 3)] == [16, 16, 24]
    assert replace(work, response_tokens=8).row_tokens(1) == 24
    assert work.responses_per_step == 4


def test_the_largest_microbatch_by_hand():
    work = small_work()
    packed = replace(work, packed_tokens=40).microbatch(1)
    assert (packed.rows, packed.tokens, packed.tiles) == (1, 40, 8), "four prompts of 10 tokens, two tiles each"
    assert replace(work, packed_tokens=12).microbatch(1).tokens == 16, "a longer row makes the packed one longer"
    pair = replace(work, packed_tokens=12, stage=StageName.mpo)
    assert pair.microbatch(1).tokens == 2 * 16, "each with its prompt"
    assert replace(pair, shares_prompts=True).microbatch(1).tokens == 24, "10 + 2 x 7 tokens"
    # Four responses of 16 tokens: two in a row of 40, or one in a row of 12.
    assert [replace(work, packed_tokens=size).microbatches(Layout()) for size in (40, 12)] == [2, 4]


def test_a_workload_takes_as_many_tiles_as_the_prompt_has_room_for():
    recipe = load_recipe(RECIPE)
    assert Workload.from_recipe(recipe, ARCHITECTURE).tiles == recipe.data.max_tiles + 1
    short = load_recipe(RECIPE, ["data.max_prompt_tokens=1000"])
    assert Workload.from_recipe(short, ARCHITECTURE).tiles == 1000 // 256
    assert Workload.from_recipe(recipe, ARCHITECTURE, tiles=2).tiles == 2
    align = Workload.from_recipe(recipe, ARCHITECTURE, stage=StageName.align)
    assert (align.responses_per_prompt, align.updates_per_step, align.buffer_capacity) == (1, 1, 0)


def test_keys_and_values_of_a_token_by_hand():
    one_layer = 2 * 2 * 4 * 4  # keys and values, heads, channels, bytes
    assert kv_bytes_per_token(SMALL, Layout(), 4, 0) == 4 * one_layer
    assert kv_bytes_per_token(SMALL, Layout(tensor=2), 4, 0) == 4 * one_layer // 2
    assert kv_bytes_per_token(SMALL, Layout(tensor=4), 4, 0) == 4 * one_layer // 2, "one head on each rank at least"
    uneven = Layout(pipeline=2, first_stage_layers=1)
    assert [kv_bytes_per_token(SMALL, uneven, 2, stage) for stage in (0, 1)] == [one_layer // 2, 3 * one_layer // 2]


def test_the_cache_of_a_small_model_by_hand():
    block = 256 * kv_bytes_per_token(SMALL, Layout(), 4, 0)
    assert kv_cache_bytes(SMALL, Layout(), small_work(), 0) == 3 * block, "two requests of one block, and a spare one"
    assert kv_cache_bytes(SMALL, Layout(), small_work(response_tokens=247), 0) == 5 * block
    limited = small_work(max_requests=100, kv_cache_gib=10.5 * block / GIB)
    assert kv_cache_bytes(SMALL, Layout(), limited, 0) == 10 * block


def test_features_and_host_memory_by_hand():
    assert prompt_feature_bytes(SMALL, small_work()) == 2 * 1 * 32 * 4  # tiles, tokens, channels, bytes
    plan = plan_memory(SMALL, Layout(data=2), small_work())
    # Two of three samples in a process: 17 ids, log-probs of both kinds for 7 tokens, and two tiles of 4 x 4 pixels.
    assert plan.host_buffer == 2 * (17 * 36 + 2 * 7 * 32)
    assert plan.host_tiles == 2 * 2 * 3 * 16
    assert plan_memory(SMALL, Layout(), small_work(buffer_capacity=0)).host_buffer == 0


def test_each_phase_has_its_own_peak():
    work = small_work()
    plan = plan_memory(SMALL, Layout(), work)
    assert [rank.phase for rank in plan.ranks] == ["gate", "generate", "update"]
    several = plan_memory(SMALL, Layout(), small_work(updates_per_step=2)).ranks
    assert [rank.phase for rank in several] == ["gate", "generate", "log_probs", "update"]
    _, generation, training = plan.ranks
    log_probs = several[2]
    model = ActivationModel(SMALL, Layout(), work.parts, 4, Recompute.none)
    batch = work.microbatch(1)
    # A microbatch on the GPU: three rows of 16 tokens. Four responses make two, or one of each of two updates.
    uploaded = 3 * 16 * 37
    assert log_probs.activations == log_probs_peak(model, batch, stage=0) + uploaded
    measured = replace(model, measures_entropy=True)
    assert training.activations == training_peak(measured, batch, stage=0, microbatches=2) + 2 * uploaded
    # Two requests draw from 64 words each: a 4-byte logit and 20 bytes beside it; prefill of 32 tokens takes more.
    assert generation.activations > 2 * 64 * 24
    crowded = plan_memory(SMALL, Layout(), small_work(max_requests=1000, prompts_per_step=500)).ranks[1]
    assert crowded.activations == 1000 * 64 * 24
    assert plan_memory(SMALL, Layout(), small_work(max_requests=1000)).ranks[1].activations < crowded.activations
    # A block table of one entry for each request; and the rotary embeddings of 31 lengths beside that of the pass.
    assert generation.buffers == 2 * 1 * 4 + 31 * 48 * 4 * 4
    assert (generation.kv_cache > 0, log_probs.kv_cache, training.kv_cache) == (True, 0, 0)
    for rank in plan.ranks:
        parts = (rank.parameters, rank.gradients, rank.optimizer, rank.activations, rank.kv_cache)
        assert rank.total == sum(parts) + rank.image_features + rank.buffers
    assert plan.peak.total == max(rank.total for rank in plan.ranks)


@pytest.mark.parametrize(("parts", "copies"), [((Part.adapter,), 1), ((Part.vision, Part.language), 2)])
def test_a_reference_costs_a_copy_of_what_trains_and_a_second_one_while_it_computes(parts, copies):
    work = small_work(parts=parts, packed_tokens=8, recompute=Recompute.full)
    plain = plan_memory(SMALL, Layout(), work).ranks
    more = plan_memory(SMALL, Layout(), replace(work, has_reference=True)).ranks
    trained = plain[2].gradients // 4 * 4
    added = [after.buffers - before.buffers for before, after in zip(plain, more, strict=True)]
    assert added == [trained, trained, copies * trained], "two where they outweigh the activations of an update"


def test_the_gate_compares_the_weights_of_replicas_in_pieces():
    work = small_work(tiles=0, max_tokens_per_step=1, prompt_tokens=1, response_tokens=1, max_requests=1)
    many_words = replace(SMALL, language=replace(SMALL.language, vocab_size=4096))
    gate = plan_memory(many_words, Layout(), work).ranks[0]
    assert (gate.activations, gate.kv_cache) == (4096 * 16 * 24, 0), "three numbers in int64 of each word's channel"


def test_a_rehearsal_gates_before_the_first_update_makes_the_buffer_of_gathered_tokens():
    work = small_work(parts=(Part.language,), gate_every=10)
    layout = Layout(tensor=2, sequence=True)
    rehearsed = replace(work, rehearsed=RehearsedStep(images=2, rows=4, validated=1))
    gathered = rehearsed.microbatch(2).tokens * 16 * 4
    (gate, generate, _), (again, *_) = (
        plan_memory(SMALL, layout, each).ranks for each in (rehearsed, replace(rehearsed, gate_every=1))
    )
    assert generate.buffers - gate.buffers == gathered
    assert again.buffers - gate.buffers == gathered
    whole = plan_memory(SMALL, layout, work).ranks
    assert whole[0].buffers == whole[1].buffers


def test_fp8_keeps_two_copies_of_all_layers_but_the_first_and_the_last():
    layers = 2 * 16 * (2 * 16 + 2 * 8 + 3 * 32)  # two of four layers
    for weights, copies in ((False, 2 * layers), (True, 0)):
        work = small_work(element_bytes=2, fp8=Fp8.tensorwise, fp8_weights=weights)
        plain = plan_memory(SMALL, Layout(), replace(work, fp8=Fp8.none)).ranks[1]
        assert plan_memory(SMALL, Layout(), work).ranks[1].buffers - plain.buffers == copies


def test_training_the_vision_tower_leaves_nothing_cached():
    frozen = plan_memory(SMALL, Layout(), small_work()).ranks[2]
    trained = plan_memory(SMALL, Layout(), small_work(parts=(Part.vision,))).ranks[2]
    # Two fresh prompts and up to two replayed ones, 256 bytes each.
    assert (frozen.image_features, trained.image_features) == (4 * 256, 0)
    cut = plan_memory(SMALL, Layout(), small_work(feature_cache_gib=300 / GIB)).ranks[2]
    assert cut.image_features == 256, "whole prompts"
    assert plan_memory(SMALL, Layout(), small_work(feature_cache_gib=255 / GIB)).ranks[2].image_features == 0


def test_adam_makes_a_float32_of_all_that_it_updates():
    work = small_work(parts=(Part.language,), prompt_tokens=2, response_tokens=2, packed_tokens=8, tiles=0)
    work = replace(work, element_bytes=2, recompute=Recompute.full)
    update = plan_memory(SMALL, Layout(), work).ranks[2]
    uploaded = 4 * 1 * 8 * 37  # each response in a microbatch of its own
    elements = largest_state(SMALL, Layout(), stage=0, parts=work.parts, element_bytes=2).shard_elements
    assert update.activations == elements * 4 + uploaded
    rehearsed = replace(work, rehearsed=RehearsedStep(images=2, rows=4, validated=1))
    assert plan_memory(SMALL, Layout(), rehearsed).ranks[2].activations < update.activations


def test_a_reward_model_beside_the_policy_has_weights_features_and_a_forward_pass():
    work = small_work(kv_cache_gib="auto", gpu_bytes=10**7, max_requests=2000, feature_cache_gib=0.0001)
    ranks, beside = (
        {rank.phase: rank for rank in plan_memory(SMALL, Layout(), each).ranks}
        for each in (work, replace(work, has_reward_model=True))
    )
    assert beside.keys() - ranks.keys() == {"reward"}
    # A score of 16 channels in place of an output layer of 64 words; the score lies in a buffer of whole 128s.
    weights = (sum(whole_model_counts(SMALL).values()) - 64 * 16 + 128) * 4
    for phase, rank in ranks.items():
        assert beside[phase].parameters - rank.parameters == weights
    features = 2 * 2 * 1 * 32 * 4
    assert [beside[phase].image_features - ranks[phase].image_features for phase in ("gate", "update")] == [
        features
    ] * 2
    block = 256 * kv_bytes_per_token(SMALL, Layout(), 4, 0)
    less = ranks["generate"].kv_cache - beside["generate"].kv_cache
    assert abs(less - weights - features) < block, "the cache takes what is left"
    assert beside["reward"].kv_cache == 0
    assert beside["reward"].activations > 0
    pairs = small_work(stage=StageName.pairs, parts=(), packed_tokens=10_000)
    (alone,), (scored,) = (
        plan_memory(SMALL, Layout(), each).ranks for each in (pairs, replace(pairs, has_reward_model=True))
    )
    assert scored.total > alone.total + weights


def test_a_rehearsed_validation_has_the_images_of_its_prompts():
    work = small_work(validated=100, max_requests=100)
    whole = _phase_load(SMALL, Layout(data=2), work, 0, "evaluate")
    rehearsed = replace(work, rehearsed=RehearsedStep(images=2, rows=4, validated=1))
    assert whole.prompts_in_flight == 100
    assert _phase_load(SMALL, Layout(data=2), rehearsed, 0, "evaluate").prompts_in_flight == 2, "one of each replica"


def test_the_gate_has_a_small_cache_and_a_forward_pass_over_few_logits():
    work = small_work(max_requests=1000)
    block = 256 * kv_bytes_per_token(SMALL, Layout(), 4, 0)
    assert kv_cache_bytes(SMALL, Layout(), work, 0, "gate") == 3 * block, "two requests of one block, and a spare one"
    shape = replace(work, shares_prompts=True, packed_tokens=64).gate_shape(1)
    assert (shape.tokens, shape.outputs) == (32, 2 * 7), "a prompt of each modality, 9 + 7 tokens each"
    assert replace(work, shares_prompts=True, packed_tokens=16).gate_shape(1).tokens == 16


def test_a_rehearsal_compares_weights_but_not_the_engine_beside_the_buffer_of_an_update():
    step = RehearsedStep(images=1, rows=250, validated=1)

    def gate(packed_tokens, **changes):
        work = small_work(parts=(Part.language,), packed_tokens=packed_tokens, rehearsed=step, **changes)
        return plan_memory(SMALL, Layout(tensor=2, sequence=True), work).ranks[0]

    # Into the buffer go 16 channels of each token, of all ranks.
    engine, weights, both = gate(48, gate_every=2), gate(4000, gate_every=2), gate(48, gate_every=1)
    assert engine.kv_cache > 0
    assert both.kv_cache == engine.kv_cache
    assert both.buffers - engine.buffers == 48 * 16 * 4
    assert weights.kv_cache == 0
    assert weights.buffers - engine.buffers == 4000 * 16 * 4
    assert weights.activations == 64 // 2 * 16 * 24, "three numbers of 8 bytes for each element of the embedding"
    # And the features of a prompt of two tiles that a reward model keeps.
    scoring = small_work(feature_cache_gib=1.0, has_reward_model=True, rehearsed=step)
    first, every = (plan_memory(SMALL, Layout(), replace(scoring, gate_every=each)).ranks[0] for each in (2, 1))
    assert every.image_features - first.image_features == 2 * 2 * 32 * 4


def test_a_validation_begins_beside_the_features_of_the_step():
    work = small_work(validated=1, feature_cache_gib=1.0, kv_cache_gib=1.0)
    many = replace(work, prompts_per_step=100_000)
    assert plan_memory(SMALL, Layout(), many).ranks[-1].image_features == 200_000 * 256
    assert plan_memory(SMALL, Layout(), work).ranks[-1].image_features < 256 * 4


def test_prefill_computes_a_prompt_once_and_again_after_an_eviction_with_its_response():
    work = small_work(max_requests=8, responses_per_prompt=4, prompts_per_step=8)
    assert work.prefilled_tokens(Layout(), "gate") == 10
    assert work.prefilled_tokens(Layout(), "generate") == 2 * 10
    assert replace(work, response_tokens=70).prefilled_tokens(Layout(), "generate") == 80


def test_a_rehearsed_step_has_an_empty_buffer_and_full_rows():
    work = small_work(shares_prompts=True, packed_tokens=40, feature_cache_gib=1.0)
    step = replace(work, rehearsed=RehearsedStep(images=1, rows=2, validated=1))
    # Two prompts, and none of those that the buffer would bring: 256 bytes each.
    assert plan_memory(SMALL, Layout(), step).ranks[2].image_features == 2 * 256
    assert plan_memory(SMALL, Layout(), work).ranks[2].image_features == 4 * 256
    # A prompt of 9 shared tokens and two responses of 7, padded; and not four short prompts.
    assert (step.microbatch(1).tokens, step.microbatch(1).tiles) == (24, 2)
    assert (work.microbatch(1).tokens, work.microbatch(1).tiles) == (40, 8)
    assert [each.microbatches(Layout()) for each in (step, work)] == [1, 2]


def test_what_does_not_divide_does_not_fit_and_limits_end_where_fitting_does():
    work = small_work()
    assert not fits(SMALL, Layout(tensor=3), work, 10 * GIB)
    limit = plan_memory(SMALL, Layout(), work).peak.total
    assert fits(SMALL, Layout(), work, limit)
    assert not fits(SMALL, Layout(), work, limit - 1)
    largest = largest_that_fits(SMALL, Layout(), work, limit)
    assert 48 <= largest["train.tokens_per_microbatch"] <= 64  # a step has 4 responses of 16 tokens
    assert 7 <= largest["generation.max_response_tokens"] <= 118  # 128 positions
    assert largest_that_fits(SMALL, Layout(), work, 1000) == dict.fromkeys(largest, 0)
