"""Rollouts from megatron-core's dynamic inference engine, on the training model's own weights.

Both use the same layout, so nothing is copied or synchronised between training and generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from megatron_r1v2.config.schema import GenerationConfig
from megatron_r1v2.generation.cache_size import PhaseLoad
from megatron_r1v2.generation.controller import PromptImages, Vocabulary
from megatron_r1v2.generation.cuda_graphs import decide_cuda_graphs
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.generation.phase import GenerationPhase
from megatron_r1v2.generation.queue import SharedPromptQueue
from megatron_r1v2.generation.sampling import Draw, response_key
from megatron_r1v2.generation.tokens import ResponseTokens
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.types import Prompt, Rollout

Progress = Callable[[int, int], None]
"""A callback that gets (finished responses, tokens in them) of this replica."""
OnFinished = Callable[[Prompt, Sequence[Rollout]], None]
"""A callback that gets a prompt and all responses to it, in the order of `sample_index`."""


@dataclass(frozen=True)
class Sampling:
    """The responses that `RolloutEngine.generate` makes for each prompt."""

    num_responses: int
    """Responses to each prompt."""
    policy_version: int
    """The number of optimizer steps behind the weights."""
    temperature: float
    """Divides the logits; 0 is greedy."""
    max_response_tokens: int
    """A response of this length ends with finish reason "length"."""
    segment_tokens: int = 0
    """A response that has drawn so many tokens in the phase ends with finish reason "segment"; 0: no bound."""
    step: int = 0
    """The steps of the run that are done: a part of the name of a response, by which its tokens are drawn."""
    top_p: float = 1.0
    """Below 1 for evaluation only: log-probs stay those of the full distribution."""
    seed: int | None = None
    """Replaces the seed of the engine."""


@dataclass(frozen=True)
class Request:
    """One response to generate."""

    request_id: int
    """An id that is unique in the phase."""
    prompt: Prompt
    draw: Draw
    max_response_tokens: int
    """The number of tokens after which the phase ends the response."""
    begun: tuple[int, ...] = ()
    """The tokens that an earlier phase drew."""


class RolloutEngine:
    """Generation of responses on one model replica; every rank of the replica makes the same calls.

    `generate` makes rollouts for prompts that are known from the start. A server opens a phase instead, adds requests
    while others decode, and takes the tokens of each step.
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
        """Store the arguments; allocate nothing.

        Args:
            model: this rank's part, not wrapped in DDP. With megatron-core's `overlap_param_gather` its weights are
                stale after an optimizer step until `start_param_sync(force_sync=True)`.
            vocab_size: the size of the tokenizer; ids from here on are padding and never drawn.

        Raises:
            ValueError: `generation.max_tokens_per_step` is below `generation.max_requests`, or
                `generation.cuda_graphs` is true where they do not hold.
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
        self.without_graphs = decide_cuda_graphs(settings.cuda_graphs, model.config, context)
        """The reason why decode launches its kernels one by one; empty: it replays CUDA graphs."""
        self.cache_bytes = 0
        """The bytes of the key-value cache of the last phase, on this rank."""
        self.num_evictions = 0
        """The evictions of the last phase; many mean that `generation.kv_cache_gib` is too small."""
        self.prefill_tokens = (0, 0)
        """The tokens that the last phase prefilled, and what each response with its own prompt would have cost."""

    def generate(
        self,
        prompts: Iterable[Prompt],
        sampling: Sampling,
        *,
        features: FeatureCache,
        progress: Progress | None = None,
        on_finished: OnFinished | None = None,
        begun: Mapping[str, Sequence[Rollout]] = MappingProxyType({}),
    ) -> list[Rollout]:
        """Collective over the replica: generate responses; the key-value cache lives as long as the call.

        Args:
            prompts: taken one by one as there is room; the same on all ranks of the replica.
            features: the features of images, filled as needed.
            progress: called after every step.
            on_finished: called as soon as all responses to a prompt have ended in this phase.
            begun: all responses to a prompt, by its key, of which some go on from an earlier phase.

        Returns:
            `sampling.num_responses` rollouts for each prompt, in the order of the prompts and then of `sample_index`,
            the same on all ranks of the replica.

        Raises:
            ValueError: a prompt is too long, its image tokens do not match its tiles, or the cache holds no sequence.
        """
        num_responses = sampling.num_responses
        admitted: list[Prompt] = []
        groups: list[list[Rollout]] = []
        """The responses to each of them; one under way as it was before the phase."""
        unfinished: list[int] = []
        tokens = ResponseTokens(sampling.max_response_tokens)
        # Response j of the prompt that was admitted as the i-th has the request id i * num_responses + j.
        in_flight = self._count_in_flight(prompts, num_responses)
        with self.open_phase(sampling.max_response_tokens, features, prompts_in_flight=in_flight) as phase:
            num_finished = num_finished_tokens = 0
            for new in self._admit(phase, prompts, num_responses):
                begin = [list(begun.get(prompt.key) or empty_rollouts(prompt, sampling)) for prompt in new]
                self.add(phase, self._requests(new, begin, sampling, first=len(admitted)), features)
                admitted += new
                groups += begin
                unfinished += [sum(rollout.finish_reason == "segment" for rollout in group) for group in begin]
                step = phase.step()
                tokens.append(step)
                for request_id in step.request_ids[step.is_last].tolist():
                    number, sample = divmod(request_id, num_responses)
                    token_ids, log_probs = tokens.pop(request_id)
                    groups[number][sample] = self._extend(groups[number][sample], token_ids, log_probs, sampling)
                    num_finished, num_finished_tokens = num_finished + 1, num_finished_tokens + len(token_ids)
                    unfinished[number] -= 1
                    if on_finished is not None and not unfinished[number]:
                        on_finished(admitted[number], groups[number])
                if progress is not None:
                    progress(num_finished, num_finished_tokens)
        return [rollout for group in groups for rollout in group]

    @contextmanager
    def open_phase(
        self, max_response_tokens: int, features: FeatureCache, *, prompts_in_flight: int | None = None
    ) -> Iterator[GenerationPhase]:
        """Collective over the replica: open a phase for prompts of up to `max_prompt_tokens`; free its cache after it.

        Args:
            features: the features that the prompts of the phase will fill.
            prompts_in_flight: the most at once; None: as many as requests.

        Raises:
            ValueError: the cache has no room for one sequence.
        """
        # no_grad and not inference_mode, whose tensors no later training step could use.
        with _evaluating(self.model), torch.no_grad():
            phase = GenerationPhase(
                self.model,
                parallel=self.parallel,
                settings=self.settings,
                vocabulary=Vocabulary(self.vocab_size, self.stop_ids),
                load=self._load(features, prompts_in_flight or self.settings.max_requests),
                max_sequence_tokens=self.max_prompt_tokens + max_response_tokens,
            )
            self.cache_bytes = phase.cache_bytes
            try:
                yield phase
                self.num_evictions, self.prefill_tokens = phase.num_evictions, phase.prefill_tokens
            finally:
                phase.close()

    def _load(self, features: FeatureCache, prompts_in_flight: int) -> PhaseLoad:
        """Return the demands of a phase on this rank."""
        config = self.model.config
        return PhaseLoad(
            element_bytes=config.params_dtype.itemsize,
            tensor=self.parallel.tensor_size,
            sequence=config.sequence_parallel,
            num_layers=len(self.model.language.decoder.layers),
            is_first_stage=self.parallel.is_first_stage,
            is_last_stage=self.parallel.is_last_stage,
            max_tokens_per_step=self.settings.max_tokens_per_step,
            max_requests=self.settings.max_requests,
            prompt_tokens=self.max_prompt_tokens,
            prompts_in_flight=prompts_in_flight,
            feature_bytes=max(0, features.limit_bytes - features.bytes_used),
            cuda_graphs=not self.without_graphs,
        )

    def add(self, phase: GenerationPhase, requests: Sequence[Request], features: FeatureCache) -> None:
        """Collective over the replica: queue requests in a phase, with the embeddings of their images."""
        # Once for each prompt: the responses to it share the embeddings.
        images = self._images(list({request.prompt.key: request.prompt for request in requests}.values()), features)
        for request in requests:
            phase.add(
                request.request_id,
                request.prompt.token_ids,
                draw=request.draw,
                images=images.get(request.prompt.key),
                max_response_tokens=request.max_response_tokens,
                prompt_key=request.prompt.key,
                begun=request.begun,
            )

    def _requests(
        self, prompts: Sequence[Prompt], begun: Sequence[Sequence[Rollout]], sampling: Sampling, *, first: int
    ) -> list[Request]:
        """Return a request for each response to prompts that has not ended; the first prompt has the number `first`."""
        seed = self.seed if sampling.seed is None else sampling.seed
        requests = []
        for number, (prompt, rollouts) in enumerate(zip(prompts, begun, strict=True), start=first):
            for sample, rollout in enumerate(rollouts):
                if rollout.finish_reason != "segment":
                    continue
                key = response_key(seed, rollout.step, prompt.key, sample)
                left = sampling.max_response_tokens - len(rollout.token_ids)
                requests.append(
                    Request(
                        request_id=number * sampling.num_responses + sample,
                        prompt=prompt,
                        draw=Draw(key, sampling.temperature, sampling.top_p),
                        max_response_tokens=min(left, sampling.segment_tokens or left),
                        begun=rollout.token_ids,
                    )
                )
        return requests

    def _count_in_flight(self, prompts: Iterable[Prompt], num_responses: int) -> int:
        """Return how many prompts there may be in flight at once."""
        slots = -(-self.settings.max_requests // num_responses)
        return min(slots, max(1, len(prompts))) if isinstance(prompts, Sized) else slots

    def _admit(self, phase: GenerationPhase, prompts: Iterable[Prompt], num_responses: int) -> Iterator[list[Prompt]]:
        """Yield the prompts to begin with before each engine step; end when all responses have."""
        source = iter(prompts)
        exhausted = False
        limit = self.settings.max_requests
        # From a shared queue, the first replica to arrive must not take everything.
        if isinstance(prompts, SharedPromptQueue):
            limit = min(limit, prompts.fair_share * num_responses)
        while True:
            new: list[Prompt] = []
            while not exhausted:
                # The responses to a prompt begin together. With nothing in flight a prompt begins even if it has more
                # responses than fit: the engine then queues some.
                in_flight = phase.num_in_flight + len(new) * num_responses
                if in_flight and in_flight + num_responses > limit:
                    break
                prompt = next(source, None)
                exhausted = prompt is None
                if prompt is not None:
                    # Before the prompt enters the engine, which would fail later and name neither prompt nor setting.
                    self.check(prompt)
                    new.append(prompt)
            if not new and not phase.num_in_flight:
                return
            yield new

    def check(self, prompt: Prompt) -> None:
        """Check that the engine can take a prompt.

        Raises:
            ValueError: the prompt is too long, or its image tokens do not match its tiles.
        """
        if len(prompt.token_ids) > self.max_prompt_tokens:
            raise ValueError(
                f"prompt {prompt.key!r} has {len(prompt.token_ids)} tokens, more than data.max_prompt_tokens="
                f"{self.max_prompt_tokens}; raise the limit, lower data.max_tiles, or take the prompt out"
            )
        architecture = self.model.architecture
        num_tokens = prompt.token_ids.count(architecture.image_token_id)
        num_tiles = prompt.tiles_TCHW.shape[0]
        num_embeddings = num_tiles * architecture.tokens_per_tile
        if num_tokens != num_embeddings:
            raise ValueError(
                f"prompt {prompt.key!r} has {num_tokens} <IMG_CONTEXT> tokens (id {architecture.image_token_id}) but "
                f"its {num_tiles} tiles give {num_embeddings} embeddings; it was tokenized for other images"
            )

    def _images(self, prompts: Sequence[Prompt], features: FeatureCache) -> dict[str, PromptImages]:
        """Collective over `groups.tp`: compute the image embeddings of prompts by key, on the first stage."""
        prompts = [prompt for prompt in prompts if prompt.modality == "image"]
        if not prompts or not self.parallel.is_first_stage:
            return {}
        image_token = self.model.architecture.image_token_id
        images = {}
        # A validation begins with hundreds of prompts, whose features together would be tens of GiB.
        for few in features.in_passes(prompts):
            for prompt, features_TFK in zip(few, features.fill(few, self.model), strict=True):
                is_image_S = torch.tensor(prompt.token_ids) == image_token
                images[prompt.key] = PromptImages(
                    positions_F=is_image_S.nonzero(as_tuple=True)[0], embeddings_FH=self.model.adapt(features_TFK)
                )
        return images

    def _extend(
        self, rollout: Rollout, token_ids: tuple[int, ...], log_probs: tuple[float, ...], sampling: Sampling
    ) -> Rollout:
        """Return a rollout with the tokens of this phase behind its own."""
        all_ids = rollout.token_ids + token_ids
        is_cut = len(all_ids) >= sampling.max_response_tokens
        return replace(
            rollout,
            token_ids=all_ids,
            rollout_log_probs=rollout.rollout_log_probs + log_probs,
            finish_reason="stop" if all_ids[-1] in self.stop_ids else "length" if is_cut else "segment",
        )


def empty_rollouts(prompt: Prompt, sampling: Sampling) -> list[Rollout]:
    """Return the responses to a prompt before their first token."""
    return [
        Rollout(prompt.key, sample, (), (), sampling.policy_version, "segment", step=sampling.step)
        for sample in range(sampling.num_responses)
    ]


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch a model to eval mode, and back to its former mode after the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
