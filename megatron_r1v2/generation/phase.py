"""A generation phase: megatron-core's dynamic engine with its key-value cache, from allocation to release."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.sampling_params import SamplingParams

from megatron_r1v2.config.schema import GenerationConfig
from megatron_r1v2.generation.cache_size import PhaseLoad
from megatron_r1v2.generation.context import make_context
from megatron_r1v2.generation.controller import (
    ImageInferenceWrapper,
    PromptImages,
    RolloutController,
    Vocabulary,
)
from megatron_r1v2.generation.cuda_graphs import graphed_layers
from megatron_r1v2.generation.sampling import Draw
from megatron_r1v2.generation.shared_prompts import SharedPromptEngine
from megatron_r1v2.generation.tokens import StepTokens
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel.groups import ParallelContext

_NO_TOKENS = StepTokens(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0, np.bool_))


class GenerationPhase:
    """megatron-core's engine with requests in flight. Collective over the replica to make.

    Each phase has a new engine, which frees the cache at its end. megatron-core's `suspend()` and `resume()` are not an
    alternative: they leave the controller with the request metadata, and so the stop tokens, of the previous phase.

    Args:
        model: this rank's part, in eval mode.
        load: the demands of the phase beside its cache; with CUDA graphs these must hold here.
        max_sequence_tokens: the longest prompt and response together.

    Raises:
        ValueError: the cache has no room for one sequence.
    """

    def __init__(
        self,
        model: R1V2Model,
        *,
        parallel: ParallelContext,
        settings: GenerationConfig,
        vocabulary: Vocabulary,
        load: PhaseLoad,
        max_sequence_tokens: int,
    ) -> None:
        config = model.config
        self._context = make_context(model, parallel, settings, load, max_sequence_tokens)
        wrapper_config = InferenceWrapperConfig(
            hidden_size=config.hidden_size,
            params_dtype=config.params_dtype,
            # Never split a step into microbatches for the pipeline.
            inference_batch_times_seqlen_threshold=-1,
            padded_vocab_size=model.language.vocab_size,
            fp32_residual_connection=config.fp32_residual_connection,
        )
        self._wrapper = ImageInferenceWrapper(model, wrapper_config, self._context, parallel)
        self._controller = RolloutController(self._wrapper, parallel, vocabulary)
        # FP8 copies of the weights are stale after an update. With this, the next forward of TransformerEngine remakes
        # them.
        model.set_is_first_microbatch()
        self._graphs = ExitStack()
        if load.cuda_graphs:
            self._graphs.enter_context(graphed_layers(model, self._context.max_tokens))
        # If the engine fails to start, nobody holds this phase to close it.
        with ExitStack() as undo:
            undo.callback(self.close)
            # megatron-core never reads the seed, but requires one; the controller draws (see sampling.py).
            self._engine = SharedPromptEngine(
                self._controller, self._context, random_seed=0, pg_collection=parallel.groups
            )
            undo.pop_all()

    @property
    def num_in_flight(self) -> int:
        """Return the number of requests that have not finished."""
        return len(self._engine.requests)

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of the cache on this rank."""
        buffer: torch.Tensor = self._context.memory_buffer
        return buffer.numel() * buffer.element_size()

    @property
    def num_evictions(self) -> int:
        """Return how many times a request lost its cache to others and was prefilled again."""
        count: int = self._engine.evicted_request_count
        return count

    @property
    def prefill_tokens(self) -> tuple[int, int]:
        """Return how many tokens were prefilled, and how many it would be with a prompt for each response."""
        computed: int = self._engine.num_prefill_tokens
        return computed, computed + self._engine.num_shared_tokens

    def add(
        self,
        request_id: int,
        token_ids: Sequence[int],
        *,
        draw: Draw,
        images: PromptImages | None,
        max_response_tokens: int,
        prompt_key: str,
        begun: Sequence[int] = (),
    ) -> None:
        """Queue a request, which joins those in flight at the next step with room; all ranks must add the same.

        Args:
            request_id: an id that is unique in the phase.
            token_ids: the prompt.
            prompt_key: the prompt's name; requests in flight with equal names and tokens have the same images, and
                compute them once.
            begun: the tokens of the response that an earlier phase drew.
            images: None for a text-only prompt, and on all stages but the first.
        """
        self._controller.draws[request_id] = draw
        if images is not None:
            self._wrapper.images[request_id] = images
        # termination_id -1 matches no token: the controller decides where a response ends.
        sampling_params = SamplingParams(num_tokens_to_generate=max_response_tokens, termination_id=-1)
        self._engine.add_response(request_id, token_ids, sampling_params, prompt_key, begun=begun)

    def cancel(self, request_id: int) -> None:
        """End a request, so that no later step returns a token of it; ignore a request that has ended."""
        waiting = self._engine.waiting_request_ids
        if request_id in waiting and request_id != self._context.chunked_prefill_request_id:
            # Not yet in megatron-core's context, so it can go at once.
            waiting.remove(request_id)
            del self._engine.requests[request_id]
            self._forget(request_id)
        elif request_id in self._engine.requests:
            # megatron-core ends a request only when it draws a token.
            self._controller.cancelled.add(request_id)

    def step(self) -> StepTokens:
        """Collective over the replica: draw one token for each active request and return them."""
        self._controller.drawn = None
        ended = {record.request_id for record in self._engine.step_modern()["finished_request_records"]}
        tokens = self._controller.drawn or _NO_TOKENS
        if self._controller.cancelled:
            tokens = tokens.select(~np.isin(tokens.request_ids, list(self._controller.cancelled)))
        for request_id in ended:
            self._forget(request_id)
        return replace(tokens, is_last=np.isin(tokens.request_ids, list(ended)))

    def close(self) -> None:
        """Free the cache, also if something still refers to the engine, and give its memory back to the device."""
        # First the graphs, which read the cache.
        self._graphs.close()
        self._context.deallocate_all_tensors()
        self._wrapper.images.clear()
        # Tensors that outlive the phase would settle in the cache's segment, and the next cache would need another one.
        torch.cuda.empty_cache()

    def _forget(self, request_id: int) -> None:
        del self._controller.draws[request_id]
        self._controller.cancelled.discard(request_id)
        self._engine.forget(request_id)
        self._wrapper.images.pop(request_id, None)
