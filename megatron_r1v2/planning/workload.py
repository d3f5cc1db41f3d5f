"""The demands of a recipe on the model: the longest rows, the most tiles, the fullest step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from megatron_r1v2.config.choices import Fp8, Packing, Part, Precision, Recompute, StageName
from megatron_r1v2.config.recipes import GrpoRecipe, PairsRecipe, TrainingRecipe
from megatron_r1v2.config.schema import AlgorithmConfig, BufferConfig, EvaluationConfig
from megatron_r1v2.generation.features import TILES_PER_PASS
from megatron_r1v2.models.architecture import R1V2Architecture
from megatron_r1v2.planning.activations import MicrobatchShape
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.training.batches import LENGTH_MULTIPLE
from megatron_r1v2.training.weight_verification import GATE_REQUESTS, GATE_TOKENS

Phase = Literal["gate", "generate", "reward", "reference", "log_probs", "update", "evaluate", "validate"]
"""A phase as the stages name it."""

_GIVEN_RESPONSES = {StageName.align: 1, StageName.mpo: 2, StageName.reward_model: 2}
"""Responses of a row that are in the data; where there are none they are sampled."""
# Of a token in a padded microbatch (training/batches.py): ids, positions, labels; float32 mask and log-probs; a flag.
_BATCH_BYTES = 3 * 8 + 3 * 4 + 1


@dataclass(frozen=True)
class RehearsedStep:
    """The part of a step that a rehearsal takes: an empty buffer, no row shorter than the longest."""

    images: int
    """Prompts with an image that a replica generates from."""
    rows: int
    """Responses that a replica trains on."""
    validated: int
    """Prompts that a replica validates on."""


@dataclass(frozen=True)
class Workload:
    """The demands of a run on the model in the worst case."""

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
    kv_cache_gib: float | Literal["auto"]
    max_requests: int
    max_tokens_per_step: int
    cuda_graphs: bool
    """Whether decode replays captured graphs."""
    feature_cache_gib: float
    buffer_capacity: int
    """0: no buffer."""
    target_effective_fraction: float
    has_reference: bool
    has_reward_model: bool = False
    """True where a reward model lies beside the policy, in its layout."""
    validated: int = 0
    """Prompts of a validation; 0: there is none."""
    validated_runs: int = 1
    """Responses to each of them."""
    gate_every: int = 1
    """Steps from one gate to the next."""
    segments: int = 1
    """Steps in which the longest response is generated."""
    gpu_bytes: int = 0
    """Bytes of a rank that tensors may take, of which a cache that is "auto" takes what is left."""
    rehearsed: RehearsedStep | None = None
    """The part of a step that is planned; None: all of the fullest one."""

    @classmethod
    def from_recipe(
        cls,
        recipe: TrainingRecipe | PairsRecipe,
        architecture: R1V2Architecture,
        *,
        stage: StageName | None = None,
        tiles: int = 0,
        gpu_bytes: int = 0,
    ) -> Workload:
        """Derive the workload of a recipe.

        Args:
            gpu_bytes: bytes of a rank that tensors may take, which a cache that is "auto" depends on.
            stage: the stage as which it is planned; None: its own. Align trains on one given response a prompt, mpo
                and reward_model on two; all without a buffer.
            tiles: tiles of a prompt; 0: as many as `data.max_tiles` and `data.max_prompt_tokens` allow.
        """
        # A prompt of several tiles gets a thumbnail too, so that none has two; two tokens enclose an image.
        most = recipe.data.max_tiles + (1 if recipe.data.max_tiles > 1 else 0)
        most = min(most, (recipe.data.max_prompt_tokens - 2) // architecture.tokens_per_tile)
        most = 1 if most == 2 else most
        stage = stage or recipe.stage or StageName.grpo
        generation, train, is_grpo = recipe.generation, recipe.train, stage is StageName.grpo
        buffer = recipe.buffer if isinstance(recipe, GrpoRecipe) else BufferConfig()
        algorithm = recipe.algorithm if isinstance(recipe, GrpoRecipe) else AlgorithmConfig()
        evaluation = recipe.evaluation if isinstance(recipe, TrainingRecipe) else EvaluationConfig()
        validates = bool(evaluation.every_steps) and stage is not StageName.pairs and bool(recipe.data.validation)
        sampled = generation.responses_per_prompt
        samples = is_grpo or stage is StageName.pairs
        return cls(
            stage=stage,
            parts=() if stage is StageName.pairs else train.parts,
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
            # On the GPUs that are planned for they hold, but for blockwise FP8.
            cuda_graphs=bool(generation.cuda_graphs) and recipe.model.fp8 is not Fp8.blockwise,
            feature_cache_gib=generation.feature_cache_gib,
            gpu_bytes=gpu_bytes,
            buffer_capacity=buffer.capacity if is_grpo else 0,
            target_effective_fraction=buffer.target_effective_fraction,
            has_reference=is_grpo and algorithm.kl_coefficient > 0,
            has_reward_model=samples
            and isinstance(recipe, GrpoRecipe | PairsRecipe)
            and recipe.reward_model.lies_beside_policy,
            # A data set of unknown size has as many as fill the engine.
            validated=(evaluation.prompts or generation.max_requests) if validates else 0,
            validated_runs=evaluation.runs,
            gate_every=algorithm.gate_every,
            segments=-(-generation.max_response_tokens // generation.segment_tokens)
            if generation.segment_tokens
            else 1,
        )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Return the phases of a step that need the GPU, in their order."""
        evaluate: tuple[Phase, ...] = ("evaluate",) if self.validated else ()
        if self.stage is StageName.pairs:
            return ("generate",)
        if self.stage is StageName.align:
            return ("update", *evaluate)
        if self.stage is StageName.mpo:
            return ("reference", "update", *evaluate)
        if self.stage is StageName.reward_model:
            return ("update", "validate") if self.validated else ("update",)
        reward: tuple[Phase, ...] = ("reward",) if self.has_reward_model else ()
        # The forward pass of an only update gives the old log-probs.
        log_probs: tuple[Phase, ...] = ("log_probs",) if self.updates_per_step > 1 else ()
        return ("gate", "generate", *reward, *log_probs, "update", *evaluate)

    @property
    def responses_per_step(self) -> int:
        """Return the responses of a step over all replicas."""
        return self.prompts_per_step * self.responses_per_prompt

    @property
    def rows_together(self) -> int:
        """Return the number of rows that stay in one microbatch and share an image: the two of a preference pair."""
        return 2 if _GIVEN_RESPONSES.get(self.stage) == 2 else 1

    @property
    def response_columns(self) -> int:
        """Return the columns of a response: its first token is the label of the last prompt token."""
        # A score is read at the last token, which is an input for that: one more column.
        return self.response_tokens + (1 if self.stage is StageName.reward_model else 0)

    def images_in_flight(self, layout: Layout, phase: Phase) -> int:
        """Return the prompts whose image embeddings the engine of a replica holds at once."""
        if phase == "gate":
            return 1
        if phase == "evaluate":
            return min(self.validated_prompts(layout), -(-self.max_requests // self.validated_runs))
        generated = self.rehearsed.images if self.rehearsed else -(-self.prompts_per_step // layout.data)
        return min(generated, -(-self.max_requests // self.responses_per_prompt))

    def images_of_pass(self, layout: Layout, phase: Phase) -> int:
        """Return the prompts whose images the engine encodes together."""
        at_once = max(1, TILES_PER_PASS // max(1, self.tiles))
        return min(at_once, max(1, self.images_in_flight(layout, phase)))

    def validated_prompts(self, layout: Layout) -> int:
        """Return the prompts that a replica validates on."""
        return self.rehearsed.validated if self.rehearsed else -(-self.validated // layout.data)

    def requests(self, layout: Layout, phase: Phase) -> int:
        """Return the responses that the engine of a replica has in flight at once, at most."""
        if phase == "gate":
            return 2  # to a prompt with an image and to one without
        if phase == "evaluate":
            runs = 1 if self.rehearsed else self.validated_runs
            return min(self.max_requests, self.validated_prompts(layout) * runs)
        return min(self.max_requests, -(-self.prompts_per_step // layout.data) * self.responses_per_prompt)

    def prefilled_tokens(self, layout: Layout, phase: Phase) -> int:
        """Return the most tokens that wait for their prefill at once: a prompt is computed once for its responses."""
        prompts = self.images_in_flight(layout, phase) * self.prompt_tokens
        # After an eviction, and in a later segment, the response so far is prefilled behind its prompt.
        is_long = phase != "gate" and (self.segments > 1 or not self.rehearsed)
        return max(prompts, self.prompt_tokens + self.response_tokens) if is_long else prompts

    def row_tokens(self, tensor: int) -> int:
        """Return the tokens of the longest row, padded as in training/batches.py."""
        return self.padded(self.prompt_tokens - 1 + self.response_columns, tensor)

    def unit_tokens(self, tensor: int) -> int:
        """Return the tokens of the longest unit (a row or a pair), each prompt with its own tokens."""
        prompts = 1 if self.shares_prompts else self.rows_together
        longest = prompts * self.row_tokens(tensor) + (self.rows_together - prompts) * self.response_columns
        return self.padded(longest, tensor)

    def microbatch(self, tensor: int) -> MicrobatchShape:
        """Return the largest microbatch: one full of tokens, or the longest unit where that is longer."""
        if self.rehearsed:
            tokens, prompts, rows = self._full_rows(tensor)
            outputs = rows * self.response_tokens if self.shares_prompts else None
            return MicrobatchShape(1, self.padded(tokens, tensor), prompts * self.tiles, outputs)
        # The padding at the end of a row is part of it.
        multiple = math.lcm(LENGTH_MULTIPLE, tensor)
        tokens = max(self.unit_tokens(tensor), self.packed_tokens // multiple * multiple)
        prompts = 1 if self.shares_prompts else self.rows_together
        # No row is shorter than its image, which bounds the tiles.
        tiles = max(1, tokens // max(1, prompts * self.prompt_tokens)) * self.tiles
        # The last prompt token predicts a response token too, and stands before each response of a shared row.
        outputs = max(1, tokens - self.prompt_tokens + 1) if self.shares_prompts else None
        return MicrobatchShape(1, tokens, tiles, outputs)

    def scored(self) -> Workload:
        """Return the workload of a reward model beside the policy: a pad token stands behind each response."""
        return replace(self, parts=(Part.score,), recompute=Recompute.none, response_tokens=self.response_tokens + 1)

    def microbatches(self, layout: Layout) -> int:
        """Return the microbatches of an update on a replica, all responses being the longest."""
        rows = -(-self.responses_per_step // (self.updates_per_step * layout.data))
        if self.rehearsed:
            rows = min(-(-self.rehearsed.rows // self.updates_per_step), rows)
        return -(-rows // self.rows_of_microbatch(layout.tensor))

    def rows_of_microbatch(self, tensor: int) -> int:
        """Return how many of the longest responses a microbatch holds."""
        return self._full_rows(tensor)[2]

    def batch_bytes(self, layout: Layout) -> int:
        """Return the bytes of an update's microbatches, which are all on the GPU before the first one runs."""
        # Not their tiles, which the tower takes when it encodes them.
        rows, row = self.rows_of_microbatch(layout.tensor), self.row_tokens(layout.tensor)
        return self.microbatches(layout) * rows * row * _BATCH_BYTES

    def gate_shape(self, tensor: int) -> MicrobatchShape:
        """Return the training forward that the engine is compared with: a response to a prompt of each modality."""
        drawn = min(GATE_TOKENS, self.response_tokens)
        tokens = self.prompt_tokens - 1 + drawn
        # In a rehearsal the prompt of text is short.
        together = (
            1 if self.rehearsed else min(GATE_REQUESTS, max(1, self.packed_tokens // self.padded(tokens, tensor)))
        )
        outputs = together * drawn if self.shares_prompts else None
        return MicrobatchShape(1, self.padded(together * tokens, tensor), self.tiles, outputs)

    def _full_rows(self, tensor: int) -> tuple[int, int, int]:
        """Return tokens, prompts and rows of a microbatch of the longest rows, packed as data/packing.py packs them."""
        multiple, units = math.lcm(LENGTH_MULTIPLE, tensor), self.responses_per_prompt // self.rows_together
        unit = self.unit_tokens(tensor)
        # The few rows of a rehearsed step may be fewer than a microbatch has room for.
        most = self.rehearsed.rows // self.rows_together if self.rehearsed else self.packed_tokens
        if not self.shares_prompts:
            count = max(1, min(self.packed_tokens // unit, most))
            return count * unit, -(-count // units), count * self.rows_together
        capacity = max(self.packed_tokens // multiple * multiple, unit)
        prompt, responses = self.prompt_tokens - 1, self.rows_together * self.response_columns
        of_prompt = max(1, min(units, (capacity - prompt) // responses, most))
        prompts = max(1, min(capacity // (prompt + of_prompt * responses), -(-most // of_prompt)))
        count = min(prompts * of_prompt, max(1, most))
        return prompts * prompt + count * responses, prompts, count * self.rows_together

    def padded(self, tokens: int, tensor: int) -> int:
        """Return the length of a row of so many tokens."""
        multiple = math.lcm(LENGTH_MULTIPLE, tensor)
        return -(-tokens // multiple) * multiple
