"""One generation phase: megatron-core's dynamic engine, with its key-value cache, from allocation to release."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.sampling_params import SamplingParams

from megatron_r1v2.config.schema import GenerationConfig
from megatron_r1v2.generation.context import make_context
from megatron_r1v2.generation.controller import (
    DrawnToken,
    ImageInferenceWrapper,
    PromptImages,
    RolloutController,
    Vocabulary,
)
from megatron_r1v2.generation.cuda_graphs import check_cuda_graphs, graphed_layers
from megatron_r1v2.generation.sampling import Draw
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel.groups import ParallelContext


class GenerationPhase:
    """megatron-core's engine with requests in flight.

    A new engine for each phase is what frees the cache and keeps phases apart: `suspend()` and `resume()` leave the
    controller with the request metadata of the phase before, and with them its stop tokens.
    """

    def __init__(
        self,
        model: R1V2Model,
        *,
        parallel: ParallelContext,
        settings: GenerationConfig,
        vocabulary: Vocabulary,
        max_sequence_tokens: int,
    ) -> None:
        """Allocate the cache.

        Args:
            model: this rank's part, in eval mode.
            parallel: where this rank stands.
            settings: bounds of memory and batch.
            vocabulary: what is drawn from, and what ends a response.
            max_sequence_tokens: of prompt and response together.

        Raises:
            ValueError: `generation.kv_cache_gib` does not hold one sequence, or graphs cannot be captured here.
        """
        config = model.config
        if settings.cuda_graphs:
            check_cuda_graphs(parallel)
        self._context = make_context(model, parallel, settings, max_sequence_tokens)
        wrapper_config = InferenceWrapperConfig(
            hidden_size=config.hidden_size,
            params_dtype=config.params_dtype,
            inference_batch_times_seqlen_threshold=-1,
            padded_vocab_size=model.language.vocab_size,
            fp32_residual_connection=config.fp32_residual_connection,
        )
        self._wrapper = ImageInferenceWrapper(model, wrapper_config, self._context, parallel)
        self._controller = RolloutController(self._wrapper, parallel, vocabulary)
        # Weights that were quantized before an update are stale: TransformerEngine makes them anew in the next forward.
        model.set_is_first_microbatch()
        self._graphs = ExitStack()
        if settings.cuda_graphs:
            self._graphs.enter_context(graphed_layers(model))
        with ExitStack() as undo:
            undo.callback(self.close)
            self._engine = DynamicInferenceEngine(
                self._controller, self._context, random_seed=0, pg_collection=parallel.groups
            )
            undo.pop_all()

    @property
    def num_in_flight(self) -> int:
        """Return the requests that have not finished."""
        return len(self._engine.requests)

    @property
    def num_evictions(self) -> int:
        """Return how often a request lost its cache to others and was prefilled again."""
        return self._engine.evicted_request_count

    def add(
        self,
        request_id: int,
        token_ids: Sequence[int],
        *,
        draw: Draw,
        images: PromptImages | None,
        max_response_tokens: int,
    ) -> None:
        """Queue a request; it joins those in flight at the next step that has room.

        Args:
            request_id: unique in the phase.
            token_ids: of the prompt.
            draw: how its tokens are drawn.
            images: None for a text-only prompt, and on all but the first stage.
            max_response_tokens: where the response is cut.
        """
        self._controller.draws[request_id] = draw
        if images is not None:
            self._wrapper.images[request_id] = images
        sampling_params = SamplingParams(num_tokens_to_generate=max_response_tokens, termination_id=-1)
        self._engine.add_request(request_id, list(token_ids), sampling_params)

    def cancel(self, request_id: int) -> None:
        """End a request, of which no step tells anything any more; one that has ended already is left alone.

        Args:
            request_id: as it was added. While it waits it is gone at once, else when it is its turn to get a token.
        """
        waiting = self._engine.waiting_request_ids
        if request_id in waiting and request_id != self._context.chunked_prefill_request_id:
            waiting.remove(request_id)
            del self._engine.requests[request_id]
            self._forget(request_id)
        elif request_id in self._engine.requests:
            self._controller.cancelled.add(request_id)

    def step(self) -> list[DrawnToken]:
        """Generate one token for each active request and return them; those that wait for room get none."""
        self._controller.drawn = []
        ended = {record.request_id for record in self._engine.step_modern()["finished_request_records"]}
        tokens = [
            replace(token, is_last=token.request_id in ended)
            for token in self._controller.drawn
            if token.request_id not in self._controller.cancelled
        ]
        for request_id in ended:
            self._forget(request_id)
        return tokens

    def close(self) -> None:
        """Free the cache, whoever still refers to the engine, and drop the graphs that read it."""
        self._graphs.close()
        self._context.deallocate_all_tensors()
        self._wrapper.images.clear()

    def _forget(self, request_id: int) -> None:
        del self._controller.draws[request_id]
        self._controller.cancelled.discard(request_id)
        self._wrapper.images.pop(request_id, None)
