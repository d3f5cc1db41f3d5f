"""The memory of each rank in each phase of a step, and the largest settings that still fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from megatron_r1v2.config.choices import Fp8, Packing, Part, Precision, Recompute, StageName
from megatron_r1v2.config.recipes import GrpoRecipe, PairsRecipe, TrainingRecipe
from megatron_r1v2.config.schema import AlgorithmConfig, BufferConfig
from megatron_r1v2.models.architecture import R1V2Architecture
from megatron_r1v2.planning.activations import ActivationModel, MicrobatchShape
from megatron_r1v2.planning.parameters import Layout, language_layer_weights, padded_vocabulary
from megatron_r1v2.planning.passes import log_probs_peak, training_peak, vision_peak
from megatron_r1v2.planning.state import ModelState, largest_state

GIB = 1024**3
Phase = Literal["generation", "log-probs", "training"]
PHASES: Mapping[StageName, tuple[Phase, ...]] = {
    StageName.grpo: ("generation", "log-probs", "training"),
    # It generates for validation only.
    StageName.align: ("generation", "training"),
    # Its log-probs are those of the reference, before the first step.
    StageName.mpo: ("generation", "log-probs", "training"),
    StageName.reward_model: ("training",),
    StageName.pairs: ("generation",),
}
_GIVEN_RESPONSES = {StageName.align: 1, StageName.mpo: 2, StageName.reward_model: 2}
"""Responses of a row that are in the data; where there are none they are sampled."""

# flash-attn's block of the paged cache (generation/context.py); without flash-attn blocks are smaller.
_CACHE_BLOCK_TOKENS = 256
# Bytes beside each gathered logit while a token is drawn: two float32 copies, probabilities, float64 sums.
_DRAW_BYTES = 4 + 4 + 4 + 8
# CPython: a slot in a tuple and a number object behind it.
_PYTHON_INT = 8 + 28
_PYTHON_FLOAT = 8 + 24


@dataclass(frozen=True)
class Workload:
    """The demands of a run on the model in the worst case: longest rows, most tiles."""

    stage: StageName
    parts: tuple[Part, ...]
    element_bytes: int
    fp8: Fp8
    fp8_weights: bool
    recompute: Recompute
    packed_tokens: int
    """Tokens of a microbatch."""
    shares_prompts: bool
    """Whether a prompt is computed once for its responses."""
    prompts_per_step: int
    responses_per_prompt: int
    updates_per_step: int
    prompt_tokens: int
    response_tokens: int
    tiles: int
    """Tiles of a prompt, the thumbnail included."""
    kv_cache_gib: float
    max_requests: int
    max_tokens_per_step: int
    feature_cache_gib: float
    buffer_capacity: int
    """0: no buffer."""
    target_effective_fraction: float
    has_reference: bool

    @classmethod
    def from_recipe(
        cls,
        recipe: TrainingRecipe | PairsRecipe,
        architecture: R1V2Architecture,
        *,
        stage: StageName | None = None,
        tiles: int = 0,
    ) -> Workload:
        """Derive the workload of a recipe.

        Args:
            stage: the stage as which it is planned; None: its own. Align trains on one given response a prompt, mpo
                and reward_model on two; all without a buffer.
            tiles: tiles of a prompt; 0: as many as `data.max_tiles` and `data.max_prompt_tokens` allow.
        """
        # A prompt of several tiles gets a thumbnail too.
        most = recipe.data.max_tiles + (1 if recipe.data.max_tiles > 1 else 0)
        most = min(most, recipe.data.max_prompt_tokens // architecture.tokens_per_tile)
        stage = stage or recipe.stage or StageName.grpo
        generation, train, is_grpo = recipe.generation, recipe.train, stage is StageName.grpo
        buffer = recipe.buffer if isinstance(recipe, GrpoRecipe) else BufferConfig()
        algorithm = recipe.algorithm if isinstance(recipe, GrpoRecipe) else AlgorithmConfig()
        sampled = generation.responses_per_prompt
        return cls(
            stage=stage,
            parts=train.parts,
            element_bytes=2 if recipe.model.precision is Precision.bf16 else 4,
            fp8=recipe.model.fp8,
            fp8_weights=recipe.model.fp8_weights,
            recompute=train.recompute,
            packed_tokens=train.tokens_per_microbatch,
            shares_prompts=train.packing is Packing.shared,
            prompts_per_step=train.prompts_per_step,
            responses_per_prompt=_GIVEN_RESPONSES.get(stage, sampled),
            updates_per_step=train.updates_per_step if is_grpo else 1,
            prompt_tokens=recipe.data.max_prompt_tokens,
            response_tokens=generation.max_response_tokens,
            tiles=tiles or most,
            kv_cache_gib=generation.kv_cache_gib,
            max_requests=generation.max_requests,
            max_tokens_per_step=generation.max_tokens_per_step,
            feature_cache_gib=generation.feature_cache_gib,
            buffer_capacity=buffer.capacity if is_grpo else 0,
            target_effective_fraction=buffer.target_effective_fraction,
            has_reference=is_grpo and algorithm.kl_coefficient > 0,
        )

    @property
    def responses_per_step(self) -> int:
        """Return the responses of a step over all replicas."""
        return self.prompts_per_step * self.responses_per_prompt

    @property
    def rows_together(self) -> int:
        """Return the number of rows that stay in one microbatch and share an image: the two of a preference pair."""
        return 2 if _GIVEN_RESPONSES.get(self.stage) == 2 else 1

    def row_tokens(self, tensor: int) -> int:
        """Return the tokens of the longest row, padded as in training/batches.py."""
        # The last token of a response is a label and never an input.
        multiple = math.lcm(8, tensor)
        return -(-(self.prompt_tokens + self.response_tokens - 1) // multiple) * multiple

    def microbatch(self, tensor: int) -> MicrobatchShape:
        """Return the largest microbatch: one full row, or the longest response with its prompt, or pair of them."""
        # Separate rows each have their prompt, though the two of a pair share its tiles.
        prompts = 1 if self.shares_prompts else self.rows_together
        longest = prompts * self.row_tokens(tensor) + (self.rows_together - prompts) * self.response_tokens
        multiple = math.lcm(8, tensor)
        tokens = max(-(-longest // multiple) * multiple, self.packed_tokens)
        # No row is shorter than its image, which bounds the tiles.
        return MicrobatchShape(1, tokens, max(1, tokens // max(1, prompts * self.prompt_tokens)) * self.tiles)

    def microbatches(self, layout: Layout) -> int:
        """Return the microbatches of an update on a replica, all responses being the longest."""
        rows = -(-self.responses_per_step // (self.updates_per_step * layout.data))
        return -(-rows // max(1, self.packed_tokens // self.row_tokens(layout.tensor)))


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
    """Reference weights, 8-bit copies of weights, megatron-core's gather buffer, block tables."""

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
        ranks += [_rank_memory(architecture, layout, work, state, stage, phase) for phase in PHASES[work.stage]]
    samples = -(-work.buffer_capacity // layout.data)
    tokens = work.prompt_tokens + work.response_tokens
    return MemoryPlan(
        ranks=tuple(ranks),
        host_buffer=samples * (tokens * _PYTHON_INT + 2 * work.response_tokens * _PYTHON_FLOAT),
        host_tiles=samples * work.tiles * 3 * architecture.vision.image_size**2,
    )


def kv_cache_bytes(architecture: R1V2Architecture, layout: Layout, work: Workload, stage: int) -> int:
    """Compute the bytes of the paged cache, as generation/context.py allocates it with flash-attn.

    Raises:
        ValueError: `generation.kv_cache_gib` does not hold one sequence.
    """
    # One block more than the sequences own: padding tokens write there.
    block = kv_bytes_per_token(architecture, layout, work.element_bytes, stage) * _CACHE_BLOCK_TOKENS
    sequence_blocks = -(-(work.prompt_tokens + work.response_tokens) // _CACHE_BLOCK_TOKENS)
    blocks = min(int(work.kv_cache_gib * GIB) // block, work.max_requests * sequence_blocks + 1)
    if blocks < sequence_blocks + 1:
        raise ValueError(
            f"generation.kv_cache_gib={work.kv_cache_gib} does not hold one sequence of "
            f"{work.prompt_tokens + work.response_tokens} tokens on stage {stage}; give at least "
            f"{(sequence_blocks + 1) * block / GIB:.3g}"
        )
    return blocks * block


def kv_bytes_per_token(architecture: R1V2Architecture, layout: Layout, element_bytes: int, stage: int) -> int:
    """Return the bytes of keys and values of one token on one rank of a stage."""
    language = architecture.language
    heads = max(1, language.num_kv_heads // layout.tensor)
    layers = layout.layers_of_stage(architecture, stage)
    return layers * heads * 2 * language.head_size * element_bytes


def prompt_feature_bytes(architecture: R1V2Architecture, work: Workload) -> int:
    """Return the bytes of one prompt's image features; every rank of the first stage has all of them."""
    return work.tiles * architecture.tokens_per_tile * architecture.adapter_input_size * work.element_bytes


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
        # With as many requests as the cache can hold: the recipe's own bound on requests would bound the cache too.
        asked = replace(work, kv_cache_gib=quarters / 4, max_requests=100_000, max_tokens_per_step=100_000)
        plan = [_rank_memory_generation(architecture, layout, asked, work, stage) for stage in range(layout.pipeline)]
        return max(plan) <= limit

    positions = architecture.language.max_positions - work.prompt_tokens
    everything = work.responses_per_step * work.row_tokens(layout.tensor)
    return {
        "train.tokens_per_microbatch": _largest(packed_fits, everything),
        "generation.max_response_tokens": _largest(response_fits, positions),
        "generation.kv_cache_gib": _largest(cache_fits, 4 * limit // GIB) / 4,
    }


def _rank_memory(
    architecture: R1V2Architecture, layout: Layout, work: Workload, state: ModelState, stage: int, phase: Phase
) -> RankMemory:
    model = ActivationModel(architecture, layout, work.parts, work.element_bytes, work.recompute)
    batch = work.microbatch(layout.tensor)
    kv_cache = 0
    features = _feature_cache_bytes(architecture, layout, work, phase) if stage == 0 else 0
    buffers = fp8_copies(architecture, layout, work, stage)
    if work.has_reference:
        # A copy of the reference's weights, and one of the trained weights while the reference is in the model.
        trained = state.gradients // 4 * work.element_bytes
        buffers += trained * (2 if phase == "training" else 1)
    if phase == "generation":
        activations = _generation_peak(model, work, stage)
        kv_cache = kv_cache_bytes(architecture, layout, work, stage)
        buffers += work.max_requests * -(-(work.prompt_tokens + work.response_tokens) // _CACHE_BLOCK_TOKENS) * 4
    else:
        activations = log_probs_peak(model, batch, stage=stage)
        if phase == "training":
            microbatches = work.microbatches(layout)
            activations = max(activations, training_peak(model, batch, stage=stage, microbatches=microbatches))
            # torch's Adam makes a float32 temporary of all weights that it updates at once.
            activations = max(activations, state.shard_elements * 4)
            if layout.sequence and model.trains_language:
                buffers += batch.rows * batch.tokens * architecture.language.hidden_size * work.element_bytes
    return RankMemory(
        stage=stage,
        phase=phase,
        parameters=state.parameters,
        gradients=state.gradients,
        optimizer=state.optimizer,
        activations=activations,
        kv_cache=kv_cache,
        image_features=features,
        buffers=buffers,
    )


def fp8_copies(architecture: R1V2Architecture, layout: Layout, work: Workload, stage: int) -> int:
    """Return the bytes of TransformerEngine's copies of bf16 weights, in 8 bits and again transposed for backward."""
    # 8-bit weights have the transposed copy too, so they take as much as bf16 ones: nothing to add.
    if work.fp8 is Fp8.none or work.fp8_weights:
        return 0
    language = architecture.language
    # The first and the last of all layers stay in bf16.
    layers = layout.layers_of_stage(architecture, stage) - (stage == 0) - (stage == layout.pipeline - 1)
    return 2 * layers * language_layer_weights(language) // layout.tensor


def _rank_memory_generation(
    architecture: R1V2Architecture, layout: Layout, cache: Workload, work: Workload, stage: int
) -> int:
    """Return the bytes of the generation phase with the cache of one workload and the passes of another."""
    state = largest_state(architecture, layout, stage=stage, parts=work.parts, element_bytes=work.element_bytes)
    rank = _rank_memory(architecture, layout, work, state, stage, "generation")
    return rank.total - rank.kv_cache + int(cache.kv_cache_gib * GIB)


def _generation_peak(model: ActivationModel, work: Workload, stage: int) -> int:
    """Return the peak of an engine step: a full prefill, the drawing of a token, or the vision tower."""
    tokens = max(work.max_tokens_per_step, work.max_requests)
    moments = [model.language_layer(MicrobatchShape(1, tokens, 0)).forward]
    if stage == model.layout.pipeline - 1:
        words = padded_vocabulary(model.architecture.language, model.layout.tensor)
        moments.append(work.max_requests * words * (work.element_bytes + _DRAW_BYTES))
    if stage == 0 and work.tiles:
        moments.append(vision_peak(model, work.tiles))
    return max(moments)


def _feature_cache_bytes(architecture: R1V2Architecture, layout: Layout, work: Workload, phase: Phase) -> int:
    """Return the bytes of image features during a phase: the cache, and in generation the prompts in flight too."""
    one = prompt_feature_bytes(architecture, work)
    generated = -(-work.prompts_per_step // layout.data)
    held = generated
    if phase != "generation":
        # Rows go to the replica with the fewest tokens, whichever generated them; replayed ones have other prompts.
        rows = -(-work.responses_per_step // layout.data)
        replayed = int(work.responses_per_step * work.target_effective_fraction) if work.buffer_capacity else 0
        held += min(rows, work.prompts_per_step - generated + replayed)
    embeddings = 0
    if phase == "generation":
        prompts = min(generated, -(-work.max_requests // work.responses_per_prompt))
        hidden = architecture.language.hidden_size * work.element_bytes
        embeddings = prompts * work.tiles * architecture.tokens_per_tile * hidden
    is_cached = phase == "generation" or Part.vision not in work.parts
    cached = min(int(work.feature_cache_gib * GIB), held * one) if is_cached else 0
    return cached + embeddings


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
