"""Stand-ins for files, for other ranks and for hours of decoding, where a stage runs as one rehearsed rank.

Responses are not decoded to their length: the engine draws a few scripted tokens to each, and the rollout that the
stage gets has the full length, the answer at its end. So every phase sees rows as long as the recipe allows.

With `generation.segment_tokens` two responses of some groups go on, each as long after its first phase as before its
last one: the next step prefills the longest beginning, draws the last segment and trains on the whole group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from itertools import count
from typing import TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext

from megatron_r1v2.config.choices import Part
from megatron_r1v2.config.recipes import GrpoRecipe, PairsRecipe, Recipe
from megatron_r1v2.data.stream import PromptStream
from megatron_r1v2.generation import context
from megatron_r1v2.generation.controller import RolloutController
from megatron_r1v2.generation.engine import RolloutEngine, Sampling
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.generation.queue import SharedPromptQueue
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.rehearsal.preparation import MADE
from megatron_r1v2.rehearsal.rows import LONG
from megatron_r1v2.rehearsal.watch import original, replace, unwatched
from megatron_r1v2.resilience.rollout_cache import RolloutCache
from megatron_r1v2.rewards import verifiers
from megatron_r1v2.stages import loaded_reward_model, session
from megatron_r1v2.stages.grpo.stage import GrpoStage
from megatron_r1v2.stages.loaded_model import LoadedModel
from megatron_r1v2.stages.pair_shards import UnfinishedPairs
from megatron_r1v2.training.store import CheckpointStore
from megatron_r1v2.training.weight_verification import GATE_TOKENS
from megatron_r1v2.types import Prompt, Rollout

_RESPONSES_GOING_ON = 2
"""Of a group: each is prefilled by itself in the next step, the whole of its beginning."""
_STAND_IN = "stand-in"

Result = TypeVar("Result")
Function = Callable[..., object]


@dataclass(frozen=True)
class Script:
    """The responses of the rehearsed engine."""

    drawn: tuple[int, ...]
    """Tokens that the engine draws to each prompt, the last a stop token."""
    filler: int
    right: tuple[int, ...]
    """Tokens that end a right response, the stop token included; the filler before them makes it long."""
    wrong: tuple[int, ...]
    max_prompt_tokens: int
    max_response_tokens: int
    mixed_groups: int
    """Prompts of a step whose responses are some right, some wrong: these are trained on."""
    whole_groups: int | None = None
    """Long prompts of a step whose responses end in it; None: all."""

    def goes_on(self, prompt_key: str) -> bool:
        """Return whether the responses to a prompt go on in the step after that in which they began."""
        return self.whole_groups is not None and LONG in prompt_key and index_of(prompt_key) >= self.whole_groups


def index_of(prompt_key: str) -> int:
    """Return the number of a made prompt among those of its kind in its step."""
    return int(prompt_key.rpartition("-")[2])


def install_script(script: Script) -> None:
    """Let the engine draw the script, and give out rollouts of full length."""
    places: WeakKeyDictionary[RolloutController, dict[int, count[int]]] = WeakKeyDictionary()

    def extend(
        self: RolloutEngine,
        rollout: Rollout,
        token_ids: tuple[int, ...],
        log_probs: tuple[float, ...],
        sampling: Sampling,
    ) -> object:
        made: Rollout = original_extend(self, rollout, token_ids, log_probs, sampling)
        # Short ones fill the engine; those of the gate are compared on a few tokens.
        is_gated = sampling.max_response_tokens <= GATE_TOKENS
        if LONG not in made.prompt_key or is_gated or len(token_ids) < len(script.drawn):
            return made
        key, _, continued = made.prompt_key.partition("/")
        goes_on = sampling.segment_tokens > 0 and script.goes_on(key)
        if goes_on and not rollout.token_ids and made.sample_index < _RESPONSES_GOING_ON:
            begun_ids = (script.filler,) * (script.max_response_tokens - sampling.segment_tokens)
            return changed(
                made, token_ids=begun_ids, rollout_log_probs=(0.0,) * len(begun_ids), finish_reason="segment"
            )
        is_mixed = goes_on or index_of(key) < script.mixed_groups
        end = script.right if is_mixed and made.sample_index % 2 == 0 and not continued else script.wrong
        # A prompt that ends with the beginning of a response leaves that much less.
        begun = self.max_prompt_tokens - script.max_prompt_tokens
        filled = (script.filler,) * (script.max_response_tokens - begun - len(end)) + end
        return changed(made, token_ids=filled, rollout_log_probs=(0.0,) * len(filled))

    def sample(self: RolloutController, logits: torch.Tensor | None) -> None:
        requests = self._context.request_ids[self._active()].tolist()
        of_requests = places.setdefault(self, {})
        self.scripted = []
        for request in requests:
            place = of_requests.setdefault(request, count())
            is_chunk = request == self._context.chunked_prefill_request_id
            self.scripted.append(script.drawn[0 if is_chunk else min(next(place), len(script.drawn) - 1)])
        original_sample(self, logits)

    def draw(self: RolloutController, logits_RV: torch.Tensor, parameters: object, drawn: torch.Tensor) -> None:
        original_draw(self, logits_RV, parameters, drawn)
        drawn[0] = torch.tensor(self.scripted, dtype=drawn.dtype, device=drawn.device)

    original_extend, original_draw = original(RolloutEngine, "_extend"), original(RolloutController, "_draw")
    original_sample = original(RolloutController, "_dynamic_step_sample_logits")
    replace(RolloutEngine, "_extend", extend)
    replace(RolloutController, "_draw", draw)
    replace(RolloutController, "_dynamic_step_sample_logits", sample)


def install_shares(announce: Callable[[int], None]) -> None:
    """Let each replica take every n-th prompt of a queue, as if the others had taken theirs just before.

    Args:
        announce: told the number before the leader of the replica broadcasts it.
    """
    taken: WeakKeyDictionary[SharedPromptQueue, count[int]] = WeakKeyDictionary()

    def take(queue: SharedPromptQueue) -> object:
        context = queue._context
        if queue not in taken:
            taken[queue] = count(context.data_rank, context.data_size)
            queue._counter += f"/{context.data_rank}"
        number = next(taken[queue])
        if context.is_replica_leader:
            context.store.set(queue._counter, str(number))
        announce(number)
        return original_take(queue)

    original_take = original(SharedPromptQueue, "_take")
    replace(SharedPromptQueue, "_take", take)


def install_full_cache(is_due: Callable[[], bool]) -> Counter[str]:
    """Let the cache of a phase be full once, so that a request is evicted and prefilled again.

    Args:
        is_due: whether the phase that runs is one for it.

    Returns:
        The engine's steps by kind, and the evicted requests, counted while it runs.
    """
    counts: Counter[str] = Counter()
    done: WeakSet[DynamicInferenceContext] = WeakSet()

    def update(self: DynamicInferenceContext, active: torch.Tensor, *args: object) -> object:
        decoding = self.num_decode_requests
        counts["mixed" if decoding and self.num_prefill_requests else "decode" if decoding else "prefill"] += 1
        allocator, offsets = self.block_allocator, self.request_last_kv_block_offset
        ends_block = offsets[self.paused_request_count : self.total_request_count] == self.block_size_tokens - 1
        allowed = allocator.active_count
        # One that stays must be left, and one that wants the block that is not there.
        if self not in done and is_due() and int(active.sum()) > 1 and bool((ends_block & (active == 1)).any()):
            allocator.active_count = allocator.get_active_used()
        try:
            result = original_update(self, active, *args)
        finally:
            allocator.active_count = allowed
        evicted = result.get("evict_request_ids") if result else None
        if evicted is not None and evicted.numel():
            counts["evicted"] += evicted.numel()
            done.add(self)
        return result

    original_update = original(DynamicInferenceContext, "update_requests")
    replace(DynamicInferenceContext, "update_requests", update)
    return counts


def install_counted_cache() -> None:
    """Let torch write the zeros of a cache on a CPU: nobody counts the memory that numpy gives."""
    replace(context, "lazy_zeros", torch.Tensor.zero_)


def install_files() -> None:
    """Read and write files on real tensors that nobody counts."""
    for owner, name in (
        (PromptStream, "next"),
        (PromptStream, "state_dict"),
        (PromptStream, "load_state_dict"),
        (RolloutCache, "save"),
        (RolloutCache, "load"),
        (CheckpointStore, "_write_small_files"),
        (CheckpointStore, "_publish"),
        (GrpoStage, "log_rollouts"),
        (UnfinishedPairs, "write_round"),
        (UnfinishedPairs, "finish"),
    ):
        replace(owner, name, _unwatched(original(owner, name)))
    replace(LoadedModel, "read_prompts", _all_at_once(LoadedModel.read_prompts))
    for name in ("load", "save"):
        replace(torch, name, _unwatched(original(torch, name)))
    replace(verifiers, "worker_count", lambda: 1)


def install_reward_model() -> None:
    """Let a reward model whose checkpoint is not here be the base of the policy with a head that is drawn."""

    def with_reward_model(recipe: GrpoRecipe | PairsRecipe) -> Recipe:
        if recipe.reward_model.checkpoint != MADE:
            return cast(Recipe, original_with(recipe))
        return recipe.changed(model=recipe.model.changed(checkpoint=""))

    def load(recipe: Recipe, *args: object, **kwargs: object) -> LoadedModel:
        loaded: LoadedModel = original_load(recipe, *args, **kwargs)
        return loaded if recipe.model.checkpoint else changed(loaded, changed_parts=[Part.score])

    def describe(recipe: Recipe) -> str:
        if isinstance(recipe, GrpoRecipe) and recipe.reward_model.checkpoint == MADE:
            return ""
        return cast(str, original_describe(recipe))

    original_describe = original(session, "describe_reward_model")
    original_with, original_load = (
        original(loaded_reward_model, name) for name in ("_with_reward_model", "load_model")
    )
    replace(loaded_reward_model, "_with_reward_model", with_reward_model)
    replace(loaded_reward_model, "load_model", load)
    replace(session, "describe_reward_model", describe)


def install_stand_in_features(*, rehearsed: int, prompts_of_step: int, is_step: Callable[[], bool]) -> None:
    """Fill the cache of image features as far as the prompts of a whole step would.

    Args:
        is_step: whether prompts of a step are encoded now, and not those of a validation.
        rehearsed: prompts with the most tiles that a replica generates from.
        prompts_of_step: those of the recipe.
    """

    def fill(self: FeatureCache, prompts: Sequence[Prompt], model: R1V2Model) -> list[torch.Tensor]:
        missing = [prompt for prompt in prompts if LONG in prompt.key and prompt.key not in self._features]
        known = sum(LONG in key for key in self._features)
        # The last prompts of a step are encoded when the features of the others are there.
        if (
            missing
            and is_step()
            and known + len(missing) >= rehearsed
            and not any(key.startswith(_STAND_IN) for key in self._features)
        ):
            sizes, weight = model.architecture, next(model.parameters())
            shape = (missing[0].tiles_TCHW.shape[0], sizes.tokens_per_tile, sizes.adapter_input_size)
            for number in range(prompts_of_step - rehearsed):
                features_TFK = torch.empty(shape, dtype=weight.dtype, device=weight.device)
                self._keep(f"{_STAND_IN}-{number}", features_TFK)
        return cast(list[torch.Tensor], original_fill(self, prompts, model))

    original_fill = original(FeatureCache, "fill")
    replace(FeatureCache, "fill", fill)


def _unwatched(function: Callable[..., Result]) -> Callable[..., Result]:
    def call(*args: object, **kwargs: object) -> Result:
        with unwatched():
            return function(*args, **kwargs)

    return call


def _all_at_once(function: Callable[..., Iterator[Prompt]]) -> Callable[..., Iterator[Prompt]]:
    def call(*args: object, **kwargs: object) -> Iterator[Prompt]:
        with unwatched():
            return iter(list(function(*args, **kwargs)))

    return call
