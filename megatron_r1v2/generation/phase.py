"""One generation phase: megatron-core's dynamic engine, with its key-value cache, from allocation to release."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.inference_request import DynamicInferenceRequestRecord
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.sampling_params import SamplingParams

from megatron_r1v2.config.schema import GenerationConfig
from megatron_r1v2.generation.context import make_context
from megatron_r1v2.generation.controller import ImageInferenceWrapper, PromptImages, RolloutController, Sampling
from megatron_r1v2.generation.cuda_graphs import check_cuda_graphs, graphed_layers
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel.groups import ParallelContext


@dataclass(frozen=True)
class Response:
    """What the engine generated for one request."""

    request_id: int
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]


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
        draw: Sampling,
        max_sequence_tokens: int,
    ) -> None:
        """Allocate the cache.

        Args:
            model: this rank's part, in eval mode.
            parallel: where this rank stands.
            settings: bounds of memory and batch.
            draw: how tokens are drawn.
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
        self._controller = RolloutController(self._wrapper, parallel, draw)
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
        response_key: int,
        images: PromptImages | None,
        max_response_tokens: int,
    ) -> None:
        """Queue a request.

        Args:
            request_id: unique in the phase.
            token_ids: of the prompt.
            response_key: names the response for the sampling.
            images: None for a text-only prompt, and on all but the first stage.
            max_response_tokens: where the response is cut.
        """
        self._controller.response_keys[request_id] = response_key
        if images is not None:
            self._wrapper.images[request_id] = images
        sampling_params = SamplingParams(
            num_tokens_to_generate=max_response_tokens,
            termination_id=-1,
            return_log_probs=True,
            skip_prompt_log_probs=True,
        )
        self._engine.add_request(request_id, list(token_ids), sampling_params)

    def step(self) -> list[Response]:
        """Generate one token for each active request and return the responses that ended."""
        records = self._engine.step_modern()["finished_request_records"]
        for record in records:
            del self._controller.response_keys[record.request_id]
            self._wrapper.images.pop(record.request_id, None)
        return [_response(record) for record in records]

    def close(self) -> None:
        """Free the cache, whoever still refers to the engine, and drop the graphs that read it."""
        self._graphs.close()
        self._context.deallocate_all_tensors()
        self._wrapper.images.clear()


def _response(record: DynamicInferenceRequestRecord) -> Response:
    """Put the parts of a request together: an eviction starts a new one whose prompt is all so far."""
    token_ids = tuple(token for part in record.requests for token in part.generated_tokens)
    log_probs = tuple(value for part in record.requests for value in part.generated_log_probs or ())
    assert len(token_ids) == len(log_probs), (record.request_id, len(token_ids), len(log_probs))
    return Response(record.request_id, token_ids, log_probs)
