"""The memory of each rank in each phase of a step, and the largest settings that still fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_r1v2.checkpoint.megatron.tensor_checksum import ELEMENTS_AT_ONCE
from megatron_r1v2.config.choices import Fp8, Part, StageName
from megatron_r1v2.generation.cache_size import DRAW_BYTES, CacheShape, PhaseLoad, Room, no_room, working_bytes
from megatron_r1v2.models.architecture import R1V2Architecture
from megatron_r1v2.planning.activations import ActivationModel, MicrobatchShape
from megatron_r1v2.planning.parameters import Layout, language_layer_weights, padded_vocabulary
from megatron_r1v2.planning.passes import log_probs_peak, training_peak, vision_peak
from megatron_r1v2.planning.state import ModelState, largest_state
from megatron_r1v2.planning.workload import Phase, Workload
from megatron_r1v2.training.weight_verification import GATE_REQUESTS, GATE_TOKENS

GIB = 1024**3
_GENERATES: tuple[Phase, ...] = ("gate", "generate", "evaluate")
# flash-attn's block of the paged cache (generation/context.py); without flash-attn blocks are smaller.
_CACHE_BLOCK_TOKENS = 256
# megatron-core keeps the rotary embeddings of the last lengths: an lru_cache of so many, of which a pass reads one.
_ROTARY_LENGTHS = 32
# Of an element, while a checksum mixes it: three numbers in int64.
_CHECKSUM_BYTES = 3 * 8
# CPython: a slot in a tuple and a number object behind it.
_PYTHON_INT = 8 + 28
_PYTHON_FLOAT = 8 + 24


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the GPU of one rank in one phase."""

    stage: int
    phase: Phase
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """The peak of the phase's passes, logits included."""
    kv_cache: int
    image_features: int
    buffers: int
    """Reference weights, 8-bit copies of weights, megatron-core's gather buffer, rotary embeddings, block tables."""

    @property
    def total(self) -> int:
        """Return all bytes."""
        parts = (self.parameters, self.gradients, self.optimizer, self.activations, self.kv_cache)
        return sum(parts) + self.image_features + self.buffers


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of all ranks in all phases, and of each host process."""

    ranks: tuple[RankMemory, ...]
    host_buffer: int
    """Bytes of the Selective Sample Buffer in each process, full."""
    host_tiles: int
    """Bytes of the image tiles of its samples, at most."""

    @property
    def peak(self) -> RankMemory:
        """Return the rank and phase with the most bytes."""
        return max(self.ranks, key=lambda rank: rank.total)


def plan_memory(architecture: R1V2Architecture, layout: Layout, work: Workload) -> MemoryPlan:
    """Compute the memory of every pipeline stage in every phase.

    Returns:
        One entry for each stage and phase: tensor-parallel ranks are alike, and of the data-parallel ones it is the
        rank with the most bytes.

    Raises:
        ValueError: the layout does not divide the model.
    """
    layout.check(architecture)
    ranks = []
    for stage in range(layout.pipeline):
        state = largest_state(architecture, layout, stage=stage, parts=work.parts, element_bytes=work.element_bytes)
        for phase in work.phases:
            kv_cache = kv_cache_bytes(architecture, layout, work, stage, phase) if phase in _GENERATES else 0
            ranks.append(_rank_memory(architecture, layout, work, state, stage, phase, kv_cache))
    samples = -(-work.buffer_capacity // layout.data)
    tokens = work.prompt_tokens + work.response_tokens
    return MemoryPlan(
        ranks=tuple(ranks),
        host_buffer=samples * (tokens * _PYTHON_INT + 2 * work.response_tokens * _PYTHON_FLOAT),
        host_tiles=samples * work.tiles * 3 * architecture.vision.image_size**2,
    )


def kv_cache_bytes(
    architecture: R1V2Architecture, layout: Layout, work: Workload, stage: int, phase: Phase = "generate"
) -> int:
    """Compute the bytes of the paged cache, as generation/context.py allocates it with flash-attn.

    Raises:
        ValueError: the cache has no room for one sequence.
    """
    if phase == "gate":
        work = _gate(work)
    shape = _cache_shape(architecture, layout, work, stage)
    if work.kv_cache_gib != "auto":
        blocks = shape.count_blocks(int(work.kv_cache_gib * GIB))
        if blocks <= shape.sequence_blocks:
            raise ValueError(
                f"generation.kv_cache_gib={work.kv_cache_gib} does not hold one sequence of "
                f"{work.prompt_tokens + work.response_tokens} tokens on stage {stage}; give at least "
                f"{shape.least_bytes / GIB:.3g}"
            )
        return blocks * shape.block_bytes
    return _count_free_blocks(architecture, layout, work, phase) * shape.block_bytes


# A search asks for every stage of many stages.
@lru_cache(maxsize=8)
def _count_free_blocks(architecture: R1V2Architecture, layout: Layout, work: Workload, phase: Phase) -> int:
    """Return the blocks of a cache that takes what is free on the fullest stage.

    Raises:
        NoRoomError: a stage has no room for one sequence.
    """
    counts = []
    for stage in range(layout.pipeline):
        working = working_bytes(architecture, _phase_load(architecture, layout, work, stage, phase))
        room = Room(_free_bytes(architecture, layout, work, stage), working)
        shape = _cache_shape(architecture, layout, work, stage)
        counts.append(shape.count_blocks(room.for_cache))
        if counts[-1] <= shape.sequence_blocks:
            raise no_room(shape, room)
    return min(counts)


def _cache_shape(architecture: R1V2Architecture, layout: Layout, work: Workload, stage: int) -> CacheShape:
    block = kv_bytes_per_token(architecture, layout, work.element_bytes, stage) * _CACHE_BLOCK_TOKENS
    return CacheShape(_CACHE_BLOCK_TOKENS, block, work.prompt_tokens + work.response_tokens, work.max_requests)


def _free_bytes(architecture: R1V2Architecture, layout: Layout, work: Workload, stage: int) -> int:
    """Return the bytes that weights and training leave on a rank of a stage while it generates."""
    state = largest_state(architecture, layout, stage=stage, parts=work.parts, element_bytes=work.element_bytes)
    held = state.parameters + state.gradients + state.optimizer
    held += _reward_weights(architecture, layout, work, stage) + _reward_features(architecture, layout, work, stage)
    held += _held_buffers(architecture, layout, work, state, stage) + _gathered_bytes(architecture, layout, work)
    return work.gpu_bytes - held


def _phase_load(architecture: R1V2Architecture, layout: Layout, work: Workload, stage: int, phase: Phase) -> PhaseLoad:
    validated = work.validated_prompts(layout) * layout.data if work.rehearsed else work.validated
    prompts = {"generate": work.prompts_per_step, "evaluate": validated, "gate": GATE_REQUESTS}[phase]
    responses = {"generate": work.responses_per_prompt, "evaluate": work.validated_runs, "gate": 1}[phase]
    return PhaseLoad(
        element_bytes=work.element_bytes,
        tensor=layout.tensor,
        sequence=layout.sequence,
        num_layers=layout.layers_of_stage(architecture, stage),
        is_first_stage=stage == 0,
        is_last_stage=stage == layout.pipeline - 1,
        max_tokens_per_step=work.max_tokens_per_step,
        max_requests=work.max_requests,
        prompt_tokens=work.prompt_tokens,
        prompts_in_flight=min(-(-work.max_requests // responses), prompts),
        feature_bytes=int(work.feature_cache_gib * GIB),
        cuda_graphs=work.cuda_graphs,
    )


def kv_bytes_per_token(architecture: R1V2Architecture, layout: Layout, element_bytes: int, stage: int) -> int:
    """Return the bytes of keys and values of one token on one rank of a stage."""
    language = architecture.language
    heads = max(1, language.num_kv_heads // layout.tensor)
    layers = layout.layers_of_stage(architecture, stage)
    return layers * heads * 2 * language.head_size * element_bytes


def prompt_feature_bytes(architecture: R1V2Architecture, work: Workload) -> int:
    """Return the bytes of one prompt's image features; every rank of the first stage has all of them."""
    return work.tiles * architecture.tokens_per_tile * architecture.adapter_input_size * work.element_bytes


def _gate(work: Workload) -> Workload:
    """Return the workload of the gate's own engine."""
    return replace(
        work,
        response_tokens=min(GATE_TOKENS, work.response_tokens),
        max_requests=min(GATE_REQUESTS, work.max_requests),
    )


def _block_table_bytes(work: Workload) -> int:
    return work.max_requests * -(-(work.prompt_tokens + work.response_tokens) // _CACHE_BLOCK_TOKENS) * 4


def fits(architecture: R1V2Architecture, layout: Layout, work: Workload, limit: int) -> bool:
    """Return whether every rank stays below a limit in bytes in every phase."""
    try:
        return plan_memory(architecture, layout, work).peak.total <= limit
    except ValueError:
        return False


def largest_that_fits(architecture: R1V2Architecture, layout: Layout, work: Workload, limit: int) -> dict[str, float]:
    """Find the largest value of each of three settings that fits, the others as they are.

    Returns:
        `train.tokens_per_microbatch`, `generation.max_response_tokens` and `generation.kv_cache_gib`; 0 where even the
        smallest value does not fit.
    """

    def response_fits(tokens: int) -> bool:
        return fits(architecture, layout, replace(work, response_tokens=tokens), limit)

    def packed_fits(tokens: int) -> bool:
        return fits(architecture, layout, replace(work, packed_tokens=tokens), limit)

    def cache_fits(quarters: int) -> bool:
        stages = range(layout.pipeline)
        return all(
            _bytes_with_cache(architecture, layout, work, stage, quarters * GIB // 4) <= limit for stage in stages
        )

    positions = architecture.language.max_positions - work.prompt_tokens
    everything = work.responses_per_step * work.row_tokens(layout.tensor)
    return {
        "train.tokens_per_microbatch": _largest(packed_fits, everything),
        "generation.max_response_tokens": _largest(response_fits, positions),
        "generation.kv_cache_gib": _largest(cache_fits, 4 * limit // GIB) / 4,
    }


def _rank_memory(
    architecture: R1V2Architecture,
    layout: Layout,
    work: Workload,
    state: ModelState,
    stage: int,
    phase: Phase,
    kv_cache: int,
) -> RankMemory:
    """Return the fullest moment of a phase.

    Args:
        kv_cache: bytes that the phase allocates for keys and values.
    """
    model = ActivationModel(
        architecture,
        layout,
        work.parts,
        work.element_bytes,
        work.recompute,
        measures_entropy=work.stage is StageName.grpo,
    )
    buffers = _held_buffers(architecture, layout, work, state, stage)
    gathered = _gathered_bytes(architecture, layout, work)
    if phase in _GENERATES:
        moments = _engine_moments(model, work, state, stage, phase, kv_cache)
        activations, kv_cache, features, kept = max(moments, key=sum)
        buffers += kept + _block_table_bytes(_gate(work) if phase == "gate" else work)
    elif phase == "reward":
        activations = _reward_peak(model, work, stage)
        features = _features_held(architecture, layout, work, stage, phase)
        buffers += gathered
    else:
        # Of a whole step the buffer brings prompts that were not generated from; in other stages nothing was.
        is_encoded = work.rehearsed is not None and work.stage is StageName.grpo and _holds_all(model, work, phase)
        batch = replace(work.microbatch(layout.tensor), is_encoded=is_encoded)
        peaks = [(_training_phase_peak(model, work, state, batch, stage, phase), 0)]
        if work.has_reference and phase == "update":
            # The trained weights lie aside while those of the reference are in the model.
            passes = log_probs_peak(model, batch, stage=stage) + work.batch_bytes(layout)
            peaks.append((passes, _trained_weights(work, state)))
        activations, aside = max(peaks, key=sum)
        features = _features_held(architecture, layout, work, stage, phase)
        buffers += aside + gathered
    return RankMemory(
        stage=stage,
        phase=phase,
        parameters=state.parameters + _reward_weights(architecture, layout, work, stage),
        gradients=state.gradients,
        optimizer=state.optimizer,
        activations=activations,
        kv_cache=kv_cache,
        image_features=features,
        buffers=buffers,
    )


def _engine_moments(
    model: ActivationModel, work: Workload, state: ModelState, stage: int, phase: Phase, kv_cache: int
) -> list[tuple[int, int, int, int]]:
    """Return the bytes of activations, cache, features and gather buffer at the fullest moments of an engine phase."""
    architecture, layout = model.architecture, model.layout
    features = _feature_bytes(architecture, layout, work, phase) if stage == 0 else 0
    gathered = _gathered_bytes(architecture, layout, work)
    of_reward = _reward_features(architecture, layout, work, stage)
    vision, embeddings = _image_moment(model, work, phase) if stage == 0 else (0, 0)
    # Images are embedded before their requests begin, those of the last pass beside the features of the others.
    of_others = max(0, features - work.images_of_pass(layout, phase) * prompt_feature_bytes(architecture, work))
    # A rehearsal compares the engine in its first step, before a reward model and an update leave anything.
    is_first = phase == "gate" and work.rehearsed is not None and work.gate_every > 1
    scored, kept = (0, 0) if is_first else (of_reward, gathered)
    moments = [
        (_decode_peak(model, work, stage, phase), kv_cache, features + embeddings + scored, kept),
        (vision, kv_cache, of_others + embeddings + scored, kept),
    ]
    if phase == "gate":
        # The training forward that it compares the engine with runs when the cache is gone.
        shape = replace(work.gate_shape(layout.tensor), is_encoded=features > 0)
        moments.append((log_probs_peak(model, shape, stage=stage), 0, features + scored, kept))
        # In every step the weights of all replicas are compared before it.
        moments.append((min(state.largest_parameter, ELEMENTS_AT_ONCE) * _CHECKSUM_BYTES, 0, of_reward, gathered))
    if phase == "evaluate":
        # It begins while the features of the step before are held.
        moments.append((0, 0, _features_held(architecture, layout, work, stage, "update"), gathered))
    if work.stage is StageName.pairs and work.has_reward_model:
        moments.append((_reward_peak(model, work, stage), 0, features + of_reward, gathered))
    return moments


def _held_buffers(architecture: R1V2Architecture, layout: Layout, work: Workload, state: ModelState, stage: int) -> int:
    """Return the bytes beside weights, gradients and optimizer that a rank holds in every phase."""
    buffers = fp8_copies(architecture, layout, work, stage)
    if work.has_reference:
        buffers += _trained_weights(work, state)  # those of the reference
    if work.rehearsed:
        # Its microbatches have one length, which a pass counts; the engine another one.
        tokens = work.prompt_tokens + work.response_tokens if "generate" in work.phases else 0
    else:
        # Microbatches of a run have many lengths, near to that of the largest.
        tokens = (_ROTARY_LENGTHS - 1) * work.microbatch(layout.tensor).tokens
    return buffers + tokens * architecture.language.head_size * 4


def _gathered_bytes(architecture: R1V2Architecture, layout: Layout, work: Workload) -> int:
    """Return the bytes of the buffer into which megatron-core gathers the sequence for weights that train."""
    if not layout.sequence or Part.language not in work.parts:
        return 0
    # The first update makes it, and it is kept.
    return work.microbatch(layout.tensor).tokens * architecture.language.hidden_size * work.element_bytes


def _trained_weights(work: Workload, state: ModelState) -> int:
    """Return the bytes of a copy of the weights that train."""
    return state.gradients // 4 * work.element_bytes


def _training_phase_peak(
    model: ActivationModel, work: Workload, state: ModelState, batch: MicrobatchShape, stage: int, phase: Phase
) -> int:
    """Return the peak of the passes of an update, or of a forward pass over what it will train on."""
    layout = model.layout
    peak = log_probs_peak(model, batch, stage=stage)
    if phase == "update":
        peak = max(peak, training_peak(model, batch, stage=stage, microbatches=work.microbatches(layout)))
        # torch's Adam makes a float32 temporary of all weights that it updates at once: on a GPU all of them; tensors
        # without memory one parameter after the other, with two temporaries.
        peak = max(peak, 4 * (2 * state.largest_shard if work.rehearsed else state.shard_elements))
    return peak + work.batch_bytes(layout)


def _reward_peak(model: ActivationModel, work: Workload, stage: int) -> int:
    """Return the peak of the passes of a reward model beside the policy over the responses of a step."""
    scored = work.scored()
    reward_model = replace(model, parts=scored.parts, recompute=scored.recompute)
    peak = log_probs_peak(reward_model, scored.microbatch(model.layout.tensor), stage=stage)
    return peak + scored.batch_bytes(model.layout)


def _features_held(architecture: R1V2Architecture, layout: Layout, work: Workload, stage: int, phase: Phase) -> int:
    """Return the bytes of image features on a rank of a stage, those of a reward model included."""
    own = _feature_bytes(architecture, layout, work, phase) if stage == 0 else 0
    return own + _reward_features(architecture, layout, work, stage)


def _reward_features(architecture: R1V2Architecture, layout: Layout, work: Workload, stage: int) -> int:
    """Return the bytes of the image features that a reward model keeps from one step to the next."""
    if stage or not work.has_reward_model:
        return 0
    return _feature_bytes(architecture, layout, work.scored(), "generate")


def _reward_weights(architecture: R1V2Architecture, layout: Layout, work: Workload, stage: int) -> int:
    """Return the bytes of the weights of a reward model beside the policy."""
    if not work.has_reward_model:
        return 0
    # With the padding of its head, a few hundred bytes that only training has.
    parts = (Part.score,)
    return largest_state(architecture, layout, stage=stage, parts=parts, element_bytes=work.element_bytes).parameters


def fp8_copies(architecture: R1V2Architecture, layout: Layout, work: Workload, stage: int) -> int:
    """Return the bytes of TransformerEngine's copies of bf16 weights, in 8 bits and again transposed for backward."""
    # 8-bit weights have the transposed copy too, so they take as much as bf16 ones: nothing to add.
    if work.fp8 is Fp8.none or work.fp8_weights:
        return 0
    language = architecture.language
    # The first and the last of all layers stay in bf16.
    layers = layout.layers_of_stage(architecture, stage) - (stage == 0) - (stage == layout.pipeline - 1)
    return 2 * layers * language_layer_weights(language) // layout.tensor


def _bytes_with_cache(architecture: R1V2Architecture, layout: Layout, work: Workload, stage: int, kv_cache: int) -> int:
    """Return the bytes of the fullest phase that has the cache, which may be larger than its requests can use."""
    state = largest_state(architecture, layout, stage=stage, parts=work.parts, element_bytes=work.element_bytes)
    # The gate has a small one of its own.
    phases = [phase for phase in work.phases if phase in _GENERATES and phase != "gate"]
    ranks = [_rank_memory(architecture, layout, work, state, stage, phase, kv_cache) for phase in phases]
    return max((rank.total for rank in ranks), default=0)


def _decode_peak(model: ActivationModel, work: Workload, stage: int, phase: Phase) -> int:
    """Return the peak of an engine step: a full prefill, or the drawing of a token."""
    requests = work.requests(model.layout, phase)
    tokens = max(min(work.max_tokens_per_step, work.prefilled_tokens(model.layout, phase)), requests)
    moments = [model.language_layer(MicrobatchShape(1, tokens, 0)).forward]
    if stage == model.layout.pipeline - 1:
        words = padded_vocabulary(model.architecture.language, model.layout.tensor)
        moments.append(requests * words * (work.element_bytes + DRAW_BYTES))
    return max(moments)


def _image_moment(model: ActivationModel, work: Workload, phase: Phase) -> tuple[int, int]:
    """Return the peak of a pass of the vision tower, and the bytes of the embeddings of all prompts in flight."""
    sizes = model.architecture
    embedding = work.tiles * sizes.tokens_per_tile * sizes.language.hidden_size * work.element_bytes
    tiles = work.images_of_pass(model.layout, phase) * work.tiles
    return vision_peak(model, tiles), work.images_in_flight(model.layout, phase) * embedding


def _feature_bytes(architecture: R1V2Architecture, layout: Layout, work: Workload, phase: Phase) -> int:
    """Return the bytes of the image features that a phase holds on the first stage."""
    one = prompt_feature_bytes(architecture, work)
    most = int(work.feature_cache_gib * GIB) // one if one else 0  # whole prompts
    if phase == "gate":
        return min(most, 1) * one
    if phase == "evaluate":
        return min(most, work.validated_prompts(layout)) * one
    if Part.vision in work.parts and phase != "generate":
        return 0  # a tower that trains leaves nothing cached
    return min(most, _prompts_held(layout, work, phase)) * one


def _holds_all(model: ActivationModel, work: Workload, phase: Phase) -> bool:
    """Return whether the features of all prompts of a phase are held."""
    one, held = prompt_feature_bytes(model.architecture, work), _prompts_held(model.layout, work, phase)
    return _feature_bytes(model.architecture, model.layout, work, phase) == held * one


def _prompts_held(layout: Layout, work: Workload, phase: Phase) -> int:
    """Return the prompts of a step whose features a replica holds, as far as the cache's limit allows."""
    # In segments every prompt that began in the last steps may have a response that goes on.
    generated = -(-work.prompts_per_step // layout.data) * work.segments
    if phase == "generate" or work.rehearsed or work.stage is not StageName.grpo:
        return generated
    # Rows go to the replica with the fewest tokens, whichever generated them; replayed ones have other prompts.
    rows = -(-work.responses_per_step // layout.data)
    replayed = int(work.responses_per_step * work.target_effective_fraction) if work.buffer_capacity else 0
    return generated + min(rows, max(0, work.prompts_per_step - generated) + replayed)


def _largest(is_possible: Callable[[int], bool], highest: int) -> int:
    """Return the largest number up to `highest` that is possible, or 0; below a possible number all are possible."""
    low, high = 0, highest
    while low < high:
        middle = (low + high + 1) // 2
        if is_possible(middle):
            low = middle
        else:
            high = middle - 1
    return low
