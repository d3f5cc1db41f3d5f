"""Times: operations and bytes by hand, and how they follow the settings."""

from dataclasses import replace

import pytest

from megatron_r1v2.config.choices import Fp8, Part, Recompute, StageName
from megatron_r1v2.planning.hardware import HARDWARE, Hardware, Host
from megatron_r1v2.planning.memory import GIB
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.planning.roofline import (
    adapter_flops,
    head_flops,
    language_layer_flops,
    prompt_visits,
    step_time,
    training_tokens,
    vision_flops,
)
from tests.planning.plans import ARCHITECTURE, SMALL, plan_of, small_work, workload

TILE = 12_608 + 1_536  # operations of tower and adapter for one tile of SMALL, see below
ONE_RANK = Layout()
# A GPU that does one tile a second in bf16, without losses and latencies.
PLAIN = Hardware("plain", TILE, 1e6, 1e6, 1e6, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)


def test_operations_of_a_small_model_by_hand():
    # Two layers of 4 x 8 x 8 + 2 x 8 x 16 weights for 5 tokens, attention of 5 over 5, and 4 patches of 3 x 2 x 2.
    assert vision_flops(SMALL.vision) == 2 * (2 * 5 * 512 + 4 * 25 * 8) + 2 * 4 * 12 * 8 == 12_608
    assert vision_flops(SMALL.vision, tensor=4) > vision_flops(SMALL.vision), "two heads become four"
    assert adapter_flops(SMALL) == 2 * (32 * 16 + 16 * 16) == 1_536
    # Four layers of 16 x (16 + 2 x 8 + 16 + 3 x 32) weights, and scores and values of 16 channels over 3 tokens.
    assert language_layer_flops(SMALL, 10, 3) == 4 * 10 * (2 * 2304 + 4 * 16 * 3) == 192_000
    assert head_flops(SMALL, 10) == 2 * 10 * 16 * 64


def small_time(stage=StageName.align, layout=ONE_RANK, hardware=PLAIN, **changes):
    responses = {"align": 1, "mpo": 2, "grpo": 2}[stage]
    work = small_work(**({"stage": stage, "element_bytes": 2, "responses_per_prompt": responses, "tiles": 1} | changes))
    return step_time(SMALL, layout, work, hardware, mean_response=5)


# The forward pass of two rows of 10 + 5 tokens, each of which sees 7.5 others on average.
FORWARD = (4 * 30 * (4608 + 64 * 7.5) + 30 * 2 * 16 * 64) / TILE


def test_an_align_step_of_a_small_model_by_hand():
    time = small_time()
    assert time.vision == 2.0, "two prompts of one tile"
    assert small_time(parts=(Part.vision,)).vision == 0.0, "a tower that trains runs in the update alone"
    assert (time.prefill, time.decode, time.log_probs) == (0.0, 0.0, 0.0)
    assert time.update == pytest.approx(2 * FORWARD), "forward and the gradients of activations"
    assert time.total == time.vision + time.update


@pytest.mark.parametrize(
    ("changes", "passes", "vision"),
    [
        ({"parts": (Part.language,)}, 3, 0),
        ({"recompute": Recompute.full}, 3, 0),
        ({"feature_cache_gib": 0.0}, 2, 0),  # its image is encoded once, with its only microbatch
        ({"parts": (Part.vision,)}, 2, 3 * 2),  # forward and both gradients
        ({"parts": (Part.vision,), "recompute": Recompute.full}, 3, 4 * 2),
    ],
)
def test_passes_over_language_model_and_vision_tower(changes, passes, vision):
    assert small_time(**changes).update == pytest.approx(passes * FORWARD + vision)


@pytest.mark.parametrize(
    ("changes", "vision"),
    [
        ({}, 0),
        # Two prompts of two responses, three a microbatch of 48 tokens: a prompt goes through the model once.
        ({"feature_cache_gib": 0.0}, 2),
        ({"feature_cache_gib": 1 * 32 * 2 / GIB}, 1),  # one prompt of two is in the cache
        ({"feature_cache_gib": 0.0, "updates_per_step": 2}, 2 * 2),  # encoded again for log-probs and update
        ({"feature_cache_gib": 0.0, "packed_tokens": 16}, 2 * 2),  # each response in a microbatch of its own
        ({"parts": (Part.vision,)}, 3 * 2),
        ({"parts": (Part.vision,), "updates_per_step": 2}, 4 * 2),
    ],
)
def test_a_grpo_update_encodes_the_images_that_are_not_cached_once_a_microbatch(changes, vision):
    changes = {"shares_prompts": True, **changes}
    cached = {"feature_cache_gib": 1.0, "parts": (Part.adapter,)}
    time, plain = (small_time(StageName.grpo, **{**changes, **others}) for others in ({}, cached))
    assert time.update - plain.update == pytest.approx(vision)


def test_a_prompt_is_computed_once_for_each_microbatch_that_its_responses_fill():
    # Ten tokens of prompt, eight responses of five.
    work = small_work(shares_prompts=True, responses_per_prompt=8, packed_tokens=49)
    assert prompt_visits(work, 5) == 1
    assert training_tokens(work, 8, 5)[0] == 10 + 8 * 5
    halves = replace(work, packed_tokens=29)
    assert prompt_visits(halves, 5) == 2
    assert training_tokens(halves, 16, 5)[0] == 2 * (2 * 10 + 8 * 5)
    assert training_tokens(replace(work, shares_prompts=False), 8, 5)[0] == 8 * 15
    pairs = replace(work, stage=StageName.mpo, responses_per_prompt=2)
    assert (prompt_visits(pairs, 5), training_tokens(pairs, 2, 5)[0]) == (1, 20)


def test_fp32_is_sixteen_times_slower_and_replicas_share_the_rows():
    assert small_time(element_bytes=4).update == pytest.approx(16 * 2 * FORWARD)
    assert small_time(layout=Layout(data=2)).update == pytest.approx(FORWARD)


def test_a_pipeline_waits_for_its_fullest_stage_and_has_a_bubble():
    uneven = small_time(layout=Layout(pipeline=2, first_stage_layers=1), packed_tokens=15)
    # Three of four layers on one of two ranks: 3/4 of the pass; one more slot for two microbatches.
    assert uneven.update == pytest.approx(2 * FORWARD * 3 / 4 * (1 + 1 / 2))


def test_tensor_parallelism_halves_products_and_adds_traffic():
    time = small_time(layout=Layout(tensor=2))
    # Two collectives a layer and pass: 30 tokens of 16 channels of 2 bytes, 2 x 1/2 of them moved at 1e6 bytes/s.
    traffic = 4 * 2 * 30 * 16 * 2 * (2 * 1 / 2) / 1e6
    assert time.update == pytest.approx(2 * (FORWARD / 2 + traffic))


def test_decode_of_a_small_model_is_bound_by_what_it_reads():
    slow = replace(PLAIN, bandwidth=100.0, bf16_flops=1e12)
    time = small_time(StageName.grpo, hardware=slow, prompts_per_step=1)
    weights = (4 * 2304 + 64 * 16) * 2
    cache = 2 * (10 + 2.5) * (4 * 2 * 2 * 4 * 2)  # two responses, half of one on average, bytes of a token
    assert time.decode_rows == 2
    assert time.decode == pytest.approx(5 * (weights + cache) / 100.0)


def test_the_host_holds_decode_up_unless_it_replays_graphs():
    host = Host(
        launches_per_layer=10, graph_launches_per_layer=1, launch_seconds=2.0, step_seconds=3.0, response_seconds=0.5
    )
    slow = replace(PLAIN, bandwidth=1000.0, bf16_flops=1e12, host=host)
    time = small_time(StageName.grpo, hardware=slow, prompts_per_step=1)
    step = time.decode / 5
    assert 8 < step < 80, "between the launches of four layers in graphs and without"
    assert time.host == pytest.approx(5 * (4 * 10 * 2.0 - step + 3.0 + 2 * 0.5))
    graphs = small_time(StageName.grpo, hardware=slow, prompts_per_step=1, cuda_graphs=True)
    assert graphs.decode == time.decode
    assert graphs.host == pytest.approx(5 * (3.0 + 2 * 0.5))
    assert small_time(hardware=slow).host == 0.0, "align decodes nothing"


def test_operations_are_two_a_weight_and_token():
    # facts of the model: 31.2 G weights in the decoder's layers, 5.53 G in the vision tower.
    assert language_layer_flops(ARCHITECTURE, 1, 0) == pytest.approx(2 * 31.2e9, rel=0.01)
    per_tile = vision_flops(ARCHITECTURE.vision)
    assert per_tile == pytest.approx(2 * 5.53e9 * 1025, rel=0.06)  # attention over 1,025 tokens on top
    # The zero heads cost something: 25 become 32.
    assert vision_flops(ARCHITECTURE.vision, tensor=8) > 1.05 * per_tile


def test_times_follow_what_is_asked():
    layout, h100 = Layout(tensor=8, sequence=True), HARDWARE["h100"]

    def seconds(*overrides, layout=layout, hardware=h100, mean=4096):
        return step_time(ARCHITECTURE, layout, workload(*overrides), hardware, mean_response=mean)

    base = seconds()
    assert base.total == base.vision + base.prefill + base.decode + base.host + base.log_probs + base.update
    # A frozen language model needs no weight gradients: 2 passes' worth instead of 3.
    assert seconds("train.parts=[adapter,language]").update > 1.2 * base.update
    assert seconds("train.recompute=full").update > 1.3 * base.update
    assert seconds(hardware=HARDWARE["h200"]).decode < base.decode
    assert seconds(hardware=HARDWARE["h200"]).update == base.update
    assert seconds(mean=8192).decode > 2 * base.decode
    half = seconds(layout=Layout(tensor=8, data=2, sequence=True))
    assert half.update == pytest.approx(base.update / 2)
    assert seconds("generation.feature_cache_gib=0").update > base.update
    # An only update gives the old log-probs on its way; those of the reference are a pass of their own.
    several = seconds("train.updates_per_step=2")
    assert base.log_probs == 0 < several.log_probs == seconds("algorithm.kl_coefficient=0.1").log_probs
    both = seconds("train.updates_per_step=2", "algorithm.kl_coefficient=0.1")
    assert both.log_probs == 2 * several.log_probs
    # Eight responses of 4,096 tokens behind a prompt of as many: 9 in place of 16, in one microbatch; 12 in four.
    separate = seconds("train.packing=first_fit_decreasing")
    whole = seconds("train.tokens_per_microbatch=36864")
    assert 9 / 16 < whole.update / separate.update < 0.65
    assert 12 / 16 < base.update / separate.update < 0.8


def test_decode_reads_the_weights_once_a_token():
    # One response: 32 G weights of 2 bytes over 8 ranks at the attained bandwidth, and 128 all-reduces.
    h100 = HARDWARE["h100"]
    alone = workload("train.prompts_per_step=1", "generation.responses_per_prompt=2", "generation.max_requests=1")
    time = step_time(ARCHITECTURE, Layout(tensor=8), alone, h100, mean_response=100)
    read = 32e9 * 2 / 8 / (h100.bandwidth * h100.bandwidth_efficiency) + 128 * h100.collective_seconds
    assert time.decode == pytest.approx(200 * read, rel=0.03)


def test_fp8_is_faster_and_costs_memory_beside_bf16_weights():
    bf16 = plan_of()
    rounded = plan_of("model.layers=te", "model.fp8=tensorwise", "model.fp8_weights=true")
    beside = plan_of("model.layers=te", "model.fp8=tensorwise")
    assert rounded.time.decode < bf16.time.decode
    assert rounded.time.update < bf16.time.update
    assert rounded.time.vision == bf16.time.vision
    assert rounded.memory.peak.total == bf16.memory.peak.total
    # 62 of 64 layers, by hand: 5120 x (2 x 5120 + 2 x 1024 + 3 x 27648) weights over 8 ranks, in 8 bits and transposed.
    copies = 62 * 5120 * (2 * 5120 + 2 * 1024 + 3 * 27648) // 8 * 2
    assert beside.memory.peak.buffers - bf16.memory.peak.buffers == copies
    # A token of one response: 62/64 of the layers' weights are read in half the bytes.
    alone = workload("train.prompts_per_step=1", "generation.responses_per_prompt=2", "generation.max_requests=1")
    in_fp8 = replace(alone, fp8=Fp8.tensorwise)
    times = [step_time(ARCHITECTURE, Layout(), work, HARDWARE["h100"], mean_response=100) for work in (alone, in_fp8)]
    saved = (times[0].decode - times[1].decode) / 200 * HARDWARE["h100"].bandwidth * 0.6
    assert saved == pytest.approx(copies * 8 / 2, rel=1e-6)


def test_fp8_needs_a_gpu_that_has_it():
    with pytest.raises(ValueError, match="model.fp8=tensorwise, but plain has no FP8 products"):
        small_time(fp8=Fp8.tensorwise)
