"""The seconds of a step by a roofline: operations over attainable FLOP/s, bytes over attainable bandwidth.

An estimate for choosing between layouts; the attained parts are assumptions that no measurement supports yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_r1v2.config.choices import Fp8, Part, Recompute, StageName
from megatron_r1v2.models.architecture import R1V2Architecture, VisionArchitecture
from megatron_r1v2.planning.hardware import Hardware, Host
from megatron_r1v2.planning.memory import GIB, kv_bytes_per_token, kv_cache_bytes, prompt_feature_bytes
from megatron_r1v2.planning.parameters import Layout, language_layer_weights, padded_vision_heads
from megatron_r1v2.planning.workload import Workload


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step."""

    vision: float
    prefill: float
    decode: float
    log_probs: float
    update: float
    decode_rows: float
    """Responses that decode at once on a replica."""
    host: float = 0.0
    """The part of decode in which the GPU waits for the CPU."""

    @property
    def total(self) -> float:
        """Return the whole step, without rewards and checkpoints."""
        return self.vision + self.prefill + self.decode + self.host + self.log_probs + self.update


def vision_flops(vision: VisionArchitecture, *, tensor: int = 1) -> float:
    """Return the forward operations of one tile, zero heads included: 2 x weights x tokens, and attention."""
    tokens = vision.num_patches + 1
    heads = padded_vision_heads(vision, tensor) * vision.head_size
    weights = vision.hidden_size * (4 * heads + 2 * vision.ffn_size)
    patches = 2 * vision.num_patches * 3 * vision.patch_size**2 * vision.hidden_size
    return vision.num_layers * (2.0 * tokens * weights + 4.0 * tokens**2 * heads) + patches


def adapter_flops(architecture: R1V2Architecture) -> float:
    """Return the forward operations of the adapter for one tile."""
    hidden = architecture.language.hidden_size
    return 2.0 * architecture.tokens_per_tile * hidden * (architecture.adapter_input_size + hidden)


def language_layer_flops(architecture: R1V2Architecture, tokens: float, context: float) -> float:
    """Return the forward operations of all layers for tokens that each see `context` tokens on average."""
    language = architecture.language
    heads = language.num_heads * language.head_size
    return language.num_layers * tokens * (2.0 * language_layer_weights(language) + 4.0 * heads * context)


def head_flops(architecture: R1V2Architecture, tokens: float) -> float:
    """Return the forward operations of the output layer."""
    return 2.0 * tokens * architecture.language.hidden_size * architecture.language.vocab_size


def _attained_flops(work: Workload, hardware: Hardware) -> float:
    attained = hardware.bf16_flops * hardware.matmul_efficiency
    return attained / 16 if work.element_bytes == 4 else attained  # fp32 without tensor cores


def _fp8_part(architecture: R1V2Architecture, work: Workload) -> float:
    """Return the part of the layers' products that is done in 8 bits."""
    # The first and the last layer stay in bf16, as Megatron's `first_last_layers_bf16` has it.
    layers = architecture.language.num_layers
    return 0.0 if work.fp8 is Fp8.none else max(0, layers - 2) / layers


def _layer_seconds(
    architecture: R1V2Architecture, work: Workload, hardware: Hardware, tokens: float, context: float
) -> float:
    """Return the seconds of one rank for the forward pass of all layers."""
    operations = language_layer_flops(architecture, tokens, context)
    in_fp8 = _fp8_part(architecture, work) * language_layer_flops(architecture, tokens, 0)
    seconds = (operations - in_fp8) / _attained_flops(work, hardware)
    return seconds + (in_fp8 / (hardware.fp8_flops * hardware.fp8_efficiency) if in_fp8 else 0.0)


def step_time(
    architecture: R1V2Architecture, layout: Layout, work: Workload, hardware: Hardware, *, mean_response: float
) -> StepTime:
    """Estimate the seconds of one step of a replica.

    Every response is counted, though a real step leaves those without advantage out.

    Args:
        mean_response: tokens of a response on average.

    Raises:
        ValueError: FP8 on a GPU that has none.
    """
    if work.fp8 is not Fp8.none and not hardware.fp8_flops:
        raise ValueError(
            f"model.fp8={work.fp8.value}, but {hardware.name} has no FP8 products; set model.fp8=none or "
            "name another --gpu"
        )
    rows = work.responses_per_step / layout.data
    prompts = work.prompts_per_step / layout.data
    model_ranks = layout.tensor * layout.pipeline
    attained = _attained_flops(work, hardware)
    tile = (vision_flops(architecture.vision, tensor=layout.tensor) + adapter_flops(architecture)) / layout.tensor
    vision = prompts * work.tiles * tile / attained
    # The engine computes a prompt once for its responses. Stages wait for one another.
    prompt_tokens = prompts * work.prompt_tokens
    prefill = _layer_seconds(architecture, work, hardware, prompt_tokens, work.prompt_tokens / 2) / layout.tensor
    prefill += _tensor_parallel_seconds(architecture, layout, work, prompt_tokens, hardware, collectives=2)
    decode, host, decode_rows = _decode_seconds(architecture, layout, work, hardware, mean_response)
    if work.stage is StageName.pairs:
        return StepTime(vision, prefill, decode, 0.0, 0.0, decode_rows, host)
    tokens, context = training_tokens(work, rows, mean_response)
    forward = _layer_seconds(architecture, work, hardware, tokens, context)
    if Part.score not in work.parts:
        forward += head_flops(architecture, rows * mean_response if work.shares_prompts else tokens) / attained
    # Every stage waits for the one with the most layers.
    most = max(layout.layers_of_stage(architecture, stage) for stage in range(layout.pipeline))
    compute = forward / model_ranks * most * layout.pipeline / architecture.language.num_layers
    bubble = 1 + (layout.pipeline - 1) / max(1.0, tokens / work.packed_tokens)
    communication = _tensor_parallel_seconds(architecture, layout, work, tokens, hardware, collectives=2)
    communication /= layout.pipeline
    log_probs = (compute + communication) * bubble * _forward_passes(work)
    # Forward and gradients of activations always; gradients of weights where they train.
    passes = 2.0 + (1 if Part.language in work.parts else 0)
    recomputed = 1 if work.recompute is Recompute.full else 0
    update = (compute * (passes + recomputed) + communication * (2 + recomputed)) * bubble
    update += _vision_update_seconds(architecture, layout, work, mean_response, tile / attained)
    if work.stage is not StageName.grpo:
        # Its images are encoded in the update, once.
        return StepTime(vision if Part.vision not in work.parts else 0.0, 0.0, 0.0, 0.0, update, 0.0)
    return StepTime(vision, prefill, decode, log_probs, update, decode_rows, host)


def _forward_passes(work: Workload) -> int:
    """Return the passes over the rows of a step before its updates."""
    # The forward pass of an only update gives the old log-probs; those of the reference are a pass of their own.
    return (1 if work.updates_per_step > 1 else 0) + (1 if work.has_reference else 0)


def prompt_visits(work: Workload, mean_response: float) -> int:
    """Return how many microbatches of a pass compute a prompt: those that its responses are spread over."""
    units = work.responses_per_prompt // work.rows_together
    if not work.shares_prompts:
        return units
    room = work.packed_tokens - (work.prompt_tokens - 1)
    return -(-units // max(1, int(room / (work.rows_together * mean_response))))


def training_tokens(work: Workload, rows: float, mean_response: float) -> tuple[float, float]:
    """Return the tokens of a pass over a replica's rows of a step, and how many others each sees on average."""
    visits = prompt_visits(work, mean_response) if work.shares_prompts else work.responses_per_prompt
    of_prompts, of_responses = rows / work.responses_per_prompt * visits * work.prompt_tokens, rows * mean_response
    seen = of_prompts * work.prompt_tokens / 2 + of_responses * (work.prompt_tokens + mean_response / 2)
    return of_prompts + of_responses, seen / (of_prompts + of_responses)


def _vision_update_seconds(
    architecture: R1V2Architecture, layout: Layout, work: Workload, mean_response: float, tile_seconds: float
) -> float:
    """Return the seconds of the vision tower in log-probs and update: none where its features are cached."""
    # A microbatch encodes the tiles of a prompt once for all of its rows.
    prompts = work.prompts_per_step / layout.data
    tiles = prompts * prompt_visits(work, mean_response) * work.tiles
    if Part.vision in work.parts:
        # Forward and both gradients for the update.
        passes = _forward_passes(work) + 3 + (1 if work.recompute is Recompute.full else 0)
        return tiles * tile_seconds * passes
    if work.stage is not StageName.grpo:
        return 0.0  # a prompt's rows are in one microbatch, which encodes its image
    held = work.feature_cache_gib * GIB / max(1, prompt_feature_bytes(architecture, work))
    return (1 + _forward_passes(work)) * max(0.0, 1 - held / max(1.0, prompts)) * tiles * tile_seconds


@dataclass(frozen=True)
class DecodeCost:
    """The seconds of a step of decode on a replica, by the responses in flight and the tokens in the cache."""

    weights: float
    """To read the weights."""
    cache_token: float
    """To read the keys and values of a token."""
    response: float
    """Products for a token of a response."""
    attended_token: float
    """Products of its attention, for each token that it sees."""
    latency: float
    """Of collectives."""
    launching: float
    """Of the host, to launch the kernels of a step."""
    host: Host

    def device_seconds(self, in_flight: float, cached: float) -> float:
        """Return the seconds on the GPU.

        Args:
            cached: tokens of all responses in flight.
        """
        memory = self.weights + cached * self.cache_token
        return max(memory, in_flight * self.response + cached * self.attended_token) + self.latency

    def host_seconds(self, in_flight: float, device_seconds: float) -> float:
        """Return how long the host holds the GPU up."""
        # The GPU runs behind the launches; it stands still while tokens are drawn and kept.
        waiting = max(0.0, self.launching - device_seconds)
        return waiting + self.host.step_seconds + in_flight * self.host.response_seconds

    def step_seconds(self, in_flight: float, cached: float) -> float:
        """Return the seconds of a step."""
        device = self.device_seconds(in_flight, cached)
        return device + self.host_seconds(in_flight, device)


def decode_cost(architecture: R1V2Architecture, layout: Layout, work: Workload, hardware: Hardware) -> DecodeCost:
    """Derive the seconds of decode from sizes and hardware."""
    language, host = architecture.language, hardware.host
    per_token = sum(
        kv_bytes_per_token(architecture, layout, work.element_bytes, stage) for stage in range(layout.pipeline)
    )
    weight_bytes = work.element_bytes - (work.element_bytes - 1) * _fp8_part(architecture, work)
    bytes_read = language.num_layers * language_layer_weights(language) * weight_bytes
    bytes_read += language.vocab_size * language.hidden_size * work.element_bytes
    # One token of each response passes all stages, one after the other: a pipeline does not make decode faster.
    bandwidth, attained = hardware.bandwidth * hardware.bandwidth_efficiency, _attained_flops(work, hardware)
    response = _layer_seconds(architecture, work, hardware, 1, 0) + head_flops(architecture, 1) / attained
    attended = language_layer_flops(architecture, 1, 1) - language_layer_flops(architecture, 1, 0)
    latency = (2 * language.num_layers if layout.tensor > 1 else 0) + layout.pipeline - 1
    of_layer = host.graph_launches_per_layer if work.cuda_graphs else host.launches_per_layer
    return DecodeCost(
        weights=bytes_read / layout.tensor / bandwidth,
        cache_token=per_token / bandwidth,
        response=response / layout.tensor,
        attended_token=attended / attained / layout.tensor,
        latency=latency * hardware.collective_seconds,
        launching=language.num_layers * of_layer * host.launch_seconds,
        host=host,
    )


def cache_tokens(architecture: R1V2Architecture, layout: Layout, work: Workload) -> float:
    """Return the tokens that the cache of a replica holds: those of its fullest stage."""
    return min(
        (kv_cache_bytes(architecture, layout, work, stage) if work.kv_cache_gib == "auto" else work.kv_cache_gib * GIB)
        / max(1, kv_bytes_per_token(architecture, layout, work.element_bytes, stage))
        for stage in range(layout.pipeline)
    )


def host_seconds(
    architecture: R1V2Architecture,
    layout: Layout,
    work: Workload,
    hardware: Hardware,
    *,
    mean_response: float,
    cuda_graphs: bool,
) -> float:
    """Estimate the seconds of a step in which decode waits for the CPU, with CUDA graphs or without."""
    asked = replace(work, cuda_graphs=cuda_graphs)
    return _decode_seconds(architecture, layout, asked, hardware, mean_response)[1]


def _decode_seconds(
    architecture: R1V2Architecture, layout: Layout, work: Workload, hardware: Hardware, mean_response: float
) -> tuple[float, float, float]:
    """Return the seconds of decode on the GPU, those it waits for the host, and the responses in flight on average."""
    rows = work.responses_per_step / layout.data
    context = work.prompt_tokens + mean_response / 2
    in_flight = max(1.0, min(rows, work.max_requests, cache_tokens(architecture, layout, work) / context))
    cost = decode_cost(architecture, layout, work, hardware)
    device, steps = cost.device_seconds(in_flight, in_flight * context), rows * mean_response / in_flight
    return device * steps, cost.host_seconds(in_flight, device) * steps, in_flight


def _tensor_parallel_seconds(
    architecture: R1V2Architecture,
    layout: Layout,
    work: Workload,
    tokens: float,
    hardware: Hardware,
    *,
    collectives: int,
) -> float:
    """Return the seconds of all-reduces (or the gather and scatter in their place) of one pass over all layers."""
    if layout.tensor == 1:
        return 0.0
    size = tokens * architecture.language.hidden_size * work.element_bytes
    moved = 2 * (layout.tensor - 1) / layout.tensor * size * collectives * architecture.language.num_layers
    return moved / (hardware.link * hardware.link_efficiency)
