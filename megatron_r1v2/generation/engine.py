"""Prompts to rollouts with megatron-core's dynamic inference engine, on the training model's own weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron_r1v2.config.schema import GenerationConfig
from megatron_r1v2.generation.controller import DrawnToken, PromptImages, Vocabulary
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.generation.phase import GenerationPhase
from megatron_r1v2.generation.queue import SharedPromptQueue
from megatron_r1v2.generation.sampling import Draw, response_key
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.types import Prompt, Rollout

Progress = Callable[[int, int], None]
"""(responses finished, tokens in them) on this replica so far."""
OnFinished = Callable[[Prompt, Sequence[Rollout]], None]
"""Called with a prompt and all responses to it, in the order of `sample_index`."""


@dataclass(frozen=True)
class Request:
    """One response to be generated."""

    request_id: int
    """Unique in the phase."""
    prompt: Prompt
    draw: Draw
    max_response_tokens: int
    """A response that reaches this is cut."""


class RolloutEngine:
    """Generates responses on one model replica; every rank of the replica makes the same calls.

    `generate` is for rollouts: all prompts are there, and all responses are wanted. Who serves opens a `phase`, adds
    requests while others decode, and takes the tokens of each step.
    """

    def __init__(
        self,
        model: R1V2Model,
        *,
        context: ParallelContext,
        settings: GenerationConfig,
        stop_ids: frozenset[int],
        vocab_size: int,
        max_prompt_tokens: int,
        seed: int,
    ) -> None:
        """Remember what to generate with; allocates nothing.

        Args:
            model: this rank's part, not wrapped in DDP. With megatron-core's `overlap_param_gather` its weights are
                stale after an optimizer step until `start_param_sync(force_sync=True)`.
            context: where this rank stands.
            settings: bounds of memory and batch.
            stop_ids: tokens that end a response.
            vocab_size: of the tokenizer; ids from here on are padding and never drawn.
            max_prompt_tokens: a longer prompt is an error.
            seed: of the sampling.

        Raises:
            ValueError: `generation.max_tokens_per_step` is below `generation.max_requests`.
        """
        if settings.max_tokens_per_step < settings.max_requests:
            raise ValueError(
                f"generation.max_tokens_per_step={settings.max_tokens_per_step} is below generation.max_requests="
                f"{settings.max_requests}, but each request needs a token a step; raise one or lower the other"
            )
        self.model = model
        self.parallel = context
        self.settings = settings
        self.stop_ids = stop_ids
        self.vocab_size = vocab_size
        self.max_prompt_tokens = max_prompt_tokens
        self.seed = seed
        self.num_evictions = 0
        """Of the last phase: many mean that `generation.kv_cache_gib` is short."""

    def generate(
        self,
        prompts: Iterable[Prompt],
        *,
        num_responses: int,
        policy_version: int,
        temperature: float,
        features: FeatureCache,
        max_response_tokens: int,
        top_p: float = 1.0,
        seed: int | None = None,
        progress: Progress | None = None,
        on_finished: OnFinished | None = None,
    ) -> list[Rollout]:
        """Generate responses; the key-value cache lives as long as the call.

        Args:
            prompts: taken one by one as there is room; the same on all ranks of the replica.
            num_responses: to each prompt.
            policy_version: optimizer steps behind the weights.
            temperature: divides the logits; 0 is greedy.
            features: of images, filled as needed.
            max_response_tokens: a response that reaches this ends with finish reason "length".
            top_p: below 1 for evaluation only: log-probs stay those of the full distribution.
            seed: instead of the engine's.
            progress: called after every step.
            on_finished: called as soon as all responses to a prompt are there.

        Returns:
            `num_responses` rollouts for each prompt, in the order of the prompts and then of `sample_index`, the same
            on all ranks of the replica.

        Raises:
            ValueError: a prompt is too long, its image tokens do not match its tiles, or the cache holds no sequence.
        """
        seed = self.seed if seed is None else seed
        taken: list[Prompt] = []
        tokens: dict[int, list[DrawnToken]] = {}

        def rollouts_to(number: int) -> list[Rollout]:
            first = number * num_responses
            return [
                self._rollout(tokens[first + sample], taken[number], sample, policy_version)
                for sample in range(num_responses)
            ]

        with self.phase(max_response_tokens) as phase:
            num_finished = num_finished_tokens = 0
            left: dict[int, int] = {}
            for new in self._admissions(phase, prompts, num_responses):
                requests = [
                    Request(
                        request_id=number * num_responses + sample,
                        prompt=prompt,
                        draw=Draw(response_key(seed, policy_version, prompt.key, sample), temperature, top_p),
                        max_response_tokens=max_response_tokens,
                    )
                    for number, prompt in enumerate(new, start=len(taken))
                    for sample in range(num_responses)
                ]
                taken += new
                self.add(phase, requests, features)
                for token in phase.step():
                    response = tokens.setdefault(token.request_id, [])
                    response.append(token)
                    if token.is_last:
                        num_finished, num_finished_tokens = num_finished + 1, num_finished_tokens + len(response)
                        number = token.request_id // num_responses
                        left[number] = left.get(number, num_responses) - 1
                        if on_finished is not None and not left[number]:
                            on_finished(taken[number], rollouts_to(number))
                if progress is not None:
                    progress(num_finished, num_finished_tokens)
        return [rollout for number in range(len(taken)) for rollout in rollouts_to(number)]

    @contextmanager
    def phase(self, max_response_tokens: int) -> Iterator[GenerationPhase]:
        """Open a generation phase, for prompts of up to `max_prompt_tokens`; its cache is freed with the block.

        Args:
            max_response_tokens: the longest response.

        Raises:
            ValueError: the cache holds no sequence.
        """
        with _evaluating(self.model), torch.no_grad():
            phase = GenerationPhase(
                self.model,
                parallel=self.parallel,
                settings=self.settings,
                vocabulary=Vocabulary(self.vocab_size, self.stop_ids),
                max_sequence_tokens=self.max_prompt_tokens + max_response_tokens,
            )
            try:
                yield phase
                self.num_evictions = phase.num_evictions
            finally:
                phase.close()

    def add(self, phase: GenerationPhase, requests: Sequence[Request], features: FeatureCache) -> None:
        """Queue requests in a phase, with the embeddings of their images; all ranks of the replica together.

        Args:
            phase: open.
            requests: their images are encoded together.
            features: of images, filled as needed.
        """
        images = self._images(list({request.prompt.key: request.prompt for request in requests}.values()), features)
        for request in requests:
            phase.add(
                request.request_id,
                request.prompt.token_ids,
                draw=request.draw,
                images=images.get(request.prompt.key),
                max_response_tokens=request.max_response_tokens,
            )

    def _admissions(
        self, phase: GenerationPhase, prompts: Iterable[Prompt], num_responses: int
    ) -> Iterator[list[Prompt]]:
        """Yield, before each engine step, the prompts to begin with; end when nothing is left to do."""
        source = iter(prompts)
        exhausted = False
        limit = self.settings.max_requests
        if isinstance(prompts, SharedPromptQueue):
            limit = min(limit, prompts.fair_share * num_responses)
        while True:
            new: list[Prompt] = []
            while not exhausted:
                in_flight = phase.num_in_flight + len(new) * num_responses
                if in_flight and in_flight + num_responses > limit:
                    break
                prompt = next(source, None)
                exhausted = prompt is None
                if prompt is not None:
                    self.check(prompt)
                    new.append(prompt)
            if not new and not phase.num_in_flight:
                return
            yield new

    def check(self, prompt: Prompt) -> None:
        """Refuse a prompt that the engine cannot take.

        Args:
            prompt: templated, tokenized and tiled.

        Raises:
            ValueError: it is too long, or its image tokens do not match its tiles.
        """
        if len(prompt.token_ids) > self.max_prompt_tokens:
            raise ValueError(
                f"prompt {prompt.key!r} has {len(prompt.token_ids)} tokens, more than data.max_prompt_tokens="
                f"{self.max_prompt_tokens}; raise the limit, lower data.max_tiles, or take the prompt out"
            )
        architecture = self.model.architecture
        found = prompt.token_ids.count(architecture.image_token_id)
        expected = prompt.tiles_TCHW.shape[0] * architecture.tokens_per_tile
        if found != expected:
            raise ValueError(
                f"prompt {prompt.key!r} has {found} <IMG_CONTEXT> tokens (id {architecture.image_token_id}) but its "
                f"{prompt.tiles_TCHW.shape[0]} tiles give {expected} embeddings; it was tokenized for other images"
            )

    def _images(self, prompts: Sequence[Prompt], features: FeatureCache) -> dict[str, PromptImages]:
        """Return the image embeddings of prompts by key, on the first stage."""
        prompts = [prompt for prompt in prompts if prompt.modality == "image"]
        if not prompts or not self.parallel.is_first_stage:
            return {}
        image_token = self.model.architecture.image_token_id
        images = {}
        for prompt, features_TFK in zip(prompts, features.fill(prompts, self.model), strict=True):
            is_image_S = torch.tensor(prompt.token_ids) == image_token
            images[prompt.key] = PromptImages(
                positions_F=is_image_S.nonzero(as_tuple=True)[0], embeddings_FH=self.model.adapt(features_TFK)
            )
        return images

    def _rollout(self, tokens: Sequence[DrawnToken], prompt: Prompt, sample_index: int, policy_version: int) -> Rollout:
        return Rollout(
            prompt_key=prompt.key,
            sample_index=sample_index,
            token_ids=tuple(token.token_id for token in tokens),
            rollout_log_probs=tuple(token.log_prob for token in tokens),
            policy_version=policy_version,
            finish_reason="stop" if tokens[-1].token_id in self.stop_ids else "length",
        )


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch to eval mode, and back to what it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
