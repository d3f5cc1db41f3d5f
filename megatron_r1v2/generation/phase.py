"""One generation phase: megatron-core's dynamic engine, with its key-value cache, from allocation to release."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.sampling_params import SamplingParams

from megatron_r1v2.config.schema import GenerationConfig
from megatron_r1v2.generation.controller import (
    BlockwiseRolloutContext,
    DrawnToken,
    ImageInferenceWrapper,
    PromptImages,
    RolloutContext,
    RolloutController,
    TensorwiseRolloutContext,
    Vocabulary,
)
from megatron_r1v2.generation.sampling import Draw
from megatron_r1v2.models.paged_attention import is_flash_attention_usable
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel.groups import ParallelContext

_GIB = 1024**3
# flash-attn wants blocks of 256 tokens; the torch stand-in copies whole blocks, so it gets small ones.
_BLOCK_TOKENS_FLASH = 256
_BLOCK_TOKENS_TORCH = 64
_CONTEXTS: Mapping[str | None, type[RolloutContext]] = {
    None: RolloutContext,
    "tensorwise": TensorwiseRolloutContext,
    "blockwise": BlockwiseRolloutContext,
}
"""How a step is padded, by the FP8 recipe of the language model."""


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
            ValueError: `generation.kv_cache_gib` does not hold one sequence.
        """
        config = model.config
        self._context = _make_context(model, parallel, settings, max_sequence_tokens)
        wrapper_config = InferenceWrapperConfig(
            hidden_size=config.hidden_size,
            params_dtype=config.params_dtype,
            inference_batch_times_seqlen_threshold=-1,
            padded_vocab_size=model.language.vocab_size,
            fp32_residual_connection=config.fp32_residual_connection,
        )
        self._wrapper = ImageInferenceWrapper(model, wrapper_config, self._context, parallel)
        self._controller = RolloutController(self._wrapper, parallel, vocabulary)
        self._engine = DynamicInferenceEngine(
            self._controller, self._context, random_seed=0, pg_collection=parallel.groups
        )

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
        """Free the cache, whoever still refers to the engine."""
        self._context.deallocate_all_tensors()
        self._wrapper.images.clear()

    def _forget(self, request_id: int) -> None:
        del self._controller.draws[request_id]
        self._controller.cancelled.discard(request_id)
        self._wrapper.images.pop(request_id, None)


def _make_context(
    model: R1V2Model, parallel: ParallelContext, settings: GenerationConfig, max_sequence_tokens: int
) -> RolloutContext:
    config = model.config
    flash = is_flash_attention_usable()
    block_tokens = _BLOCK_TOKENS_FLASH if flash else _BLOCK_TOKENS_TORCH
    layers = len(model.language.decoder.layers)
    kv_heads = max(config.num_query_groups, parallel.tensor_size)
    head_bytes = 2 * config.kv_channels * config.params_dtype.itemsize
    block_bytes = layers * block_tokens * kv_heads // parallel.tensor_size * head_bytes
    sequence_blocks = -(-max_sequence_tokens // block_tokens)
    # Sequence parallelism splits the tokens of a step, and steps are padded to these multiples.
    kind = _CONTEXTS[config.fp8_recipe if config.fp8 else None]
    max_requests = kind.round_up_requests(settings.max_requests, parallel.tensor_size)
    max_tokens = kind.round_up_tokens(settings.max_tokens_per_step, parallel.tensor_size)
    # One block more than the sequences own: padding tokens write there.
    blocks = min(int(settings.kv_cache_gib * _GIB) // block_bytes, max_requests * sequence_blocks + 1)
    if blocks < sequence_blocks + 1:
        raise ValueError(
            f"generation.kv_cache_gib={settings.kv_cache_gib} holds {max(blocks - 1, 0)} blocks of {block_tokens} "
            f"tokens, but one sequence of {max_sequence_tokens} tokens (prompt and response) needs {sequence_blocks}; "
            f"give at least {(sequence_blocks + 1) * block_bytes / _GIB:.3g}, or lower generation.max_response_tokens"
        )
    context = kind(
        params_dtype=config.params_dtype,
        num_layers=layers,
        kv_channels=config.kv_channels,
        num_attention_heads=kv_heads,
        max_sequence_length=sequence_blocks * block_tokens,
        # megatron-core divides by the block size again: half a block more keeps the count clear of rounding.
        buffer_size_gb=(blocks + 0.5) * block_bytes / _GIB,
        max_requests=max_requests,
        max_tokens=max(max_tokens, max_requests),
        block_size_tokens=block_tokens,
        pg_collection=parallel.groups,
    )
    if not flash:
        # Memory as it comes may hold NaN, which a masked position would spread (see paged_attention).
        context.memory_buffer.zero_()
    return context
