"""megatron-core's inference classes with image features, per-request sampling and sets of stop tokens.

The methods with a leading underscore that are marked `override` are hooks of megatron-core's engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from numpy.typing import NDArray
from typing_extensions import override

from megatron_r1v2.generation import sampling
from megatron_r1v2.generation.sampling import Draw
from megatron_r1v2.generation.tokens import Alternatives, StepTokens
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel.groups import ParallelContext


@dataclass(frozen=True)
class PromptImages:
    """The places of a prompt's image tokens and the embeddings for them, on the first pipeline stage."""

    positions_F: torch.Tensor
    """int64 [F], ascending, on the CPU: the positions of `<IMG_CONTEXT>` in the prompt."""
    embeddings_FH: torch.Tensor
    """[F, H]: the adapter's output, in the same order."""

    @property
    def end(self) -> int:
        """Return the position behind the last image token."""
        return int(self.positions_F[-1]) + 1


class ImageInferenceWrapper(GPTInferenceWrapper):
    """The language model behind megatron-core's engine, with image embeddings in place of image tokens.

    Args:
        config: the sizes and dtype for communication between pipeline stages.
    """

    def __init__(
        self,
        model: R1V2Model,
        config: InferenceWrapperConfig,
        inference_context: DynamicInferenceContext,
        parallel: ParallelContext,
    ) -> None:
        super().__init__(model.language, config, inference_context, parallel.groups)
        self.images: dict[int, PromptImages] = {}
        """By request id; the requests of one prompt share one object."""
        self._language = model.language
        self._tensor_group = parallel.groups.tp

    @override
    def _forward(self, inference_input: Mapping[str, torch.Tensor]) -> torch.Tensor:
        # megatron-core calls this under inference_mode. Tensors from there cannot be part of a later training step, but
        # megatron-core caches some: rotary embeddings (in an lru_cache) and sequence-parallel buffers.
        with torch.inference_mode(False), torch.no_grad():
            tokens, positions = inference_input["tokens"], inference_input["position_ids"]
            output: torch.Tensor = self.model(
                tokens,
                positions,
                None,
                decoder_input=self._decoder_input(tokens, positions),
                inference_context=self.inference_context,
                # Sampling needs the whole vocabulary.
                runtime_gather_output=True,
            )
            return output

    @override
    def _allocate_recv_buffer(self, batch_size: int, seq_len: int) -> torch.Tensor:
        with torch.inference_mode(False):
            buffer: torch.Tensor = super()._allocate_recv_buffer(batch_size, seq_len)
            return buffer

    def _decoder_input(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the input of this stage's layers."""
        if self._language.pre_process:
            return self._embed(tokens, positions)
        # Later stages pass theirs as an argument too: with FP8, megatron-core zeroes its padding and needs it here.
        received: torch.Tensor = self._language.decoder.input_tensor
        return received

    def _embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden_SBH: torch.Tensor = self._language.embedding(input_ids=tokens, position_ids=positions)
        # A token that is decoded is never an image, even if the model wrote `<IMG_CONTEXT>`.
        if self.images and not self.inference_context.is_decode_only():
            self._put_images(hidden_SBH)
        if self.sequence_parallel:
            hidden_SBH = scatter_to_sequence_parallel_region(hidden_SBH, group=self._tensor_group)
        return hidden_SBH

    def _put_images(self, hidden_SBH: torch.Tensor) -> None:
        """Replace the rows of image tokens."""
        # A step holds consecutive positions of each request: a prompt, a chunk of it, or after an eviction prompt and
        # response so far. Request and position identify an image token, so no case needs special treatment.
        context = self.inference_context
        rows = slice(context.paused_request_count, context.total_request_count)
        indices, embeddings = [], []
        first_row = 0
        for request, count, start in zip(
            context.request_ids[rows].tolist(),
            context.request_query_lengths[rows].tolist(),
            context.request_kv_length_offsets[rows].tolist(),
            strict=True,
        ):
            images = self.images.get(request)
            if images is not None and start < images.end:
                bounds = torch.tensor([start, start + count])
                low, high = torch.searchsorted(images.positions_F, bounds).tolist()
                indices.append(images.positions_F[low:high] + (first_row - start))
                embeddings.append(images.embeddings_FH[low:high])
            first_row += count
        if indices:
            index_F = torch.cat(indices).to(hidden_SBH.device)
            hidden_SBH[index_F, 0] = torch.cat(embeddings).to(hidden_SBH.dtype)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that can be drawn, and those that end a response."""

    size: int
    """The size of the tokenizer; ids from here on are padding."""
    stop_ids: frozenset[int]


@dataclass(frozen=True)
class DrawParameters:
    """The parameters of drawing for the requests of a step, in their order."""

    request_ids: list[int]
    keys_R: torch.Tensor
    """On the device."""
    temperatures_R: torch.Tensor
    """On the host, as `top_ps_R`: `sampling.draw` looks which of its steps are needed."""
    top_ps_R: torch.Tensor
    most_alternatives: int

    @classmethod
    def of(cls, request_ids: list[int], draws: Sequence[Draw], device: torch.device) -> DrawParameters:
        """Collect the parameters of requests."""
        return cls(
            request_ids,
            torch.tensor([draw.response_key for draw in draws], device=device),
            torch.tensor([draw.temperature for draw in draws], dtype=torch.float32),
            torch.tensor([draw.top_p for draw in draws], dtype=torch.float32),
            max(draw.num_alternatives for draw in draws),
        )


class RolloutController(TextGenerationController):
    """Sampling once per replica, with log-probs of the sampling distribution and sets of stop tokens."""

    def __init__(self, model: ImageInferenceWrapper, parallel: ParallelContext, vocabulary: Vocabulary) -> None:
        super().__init__(model, _NoTokenizer(), pp_group=parallel.groups.pp)
        self.draws: dict[int, Draw] = {}
        """By request id."""
        self.cancelled: set[int] = set()
        """The ids of requests that end with their next token."""
        self.drawn: StepTokens | None = None
        """The tokens of the last step; none of them is marked as the last one of its response."""
        self._request_ids: list[int] = []
        """The active requests after the last step, in the order of the context."""
        self._values: torch.Tensor | None = None
        """The values that this step draws, on the device, by the draws of its requests."""
        self._draws: Sequence[Draw] = ()
        self._parameters: DrawParameters | None = None
        """Those of `_draws`, which stay as long as the same requests decode."""
        self._context = model.inference_context
        self._vocab_size = vocabulary.size
        self._stop_ids = torch.tensor(sorted(vocabulary.stop_ids), dtype=torch.int64, device=parallel.device)
        self._model_group = parallel.groups.mp
        # The ranks of a replica are ordered by stage: the first of the last stage draws for all, so that they agree.
        ranks = dist.get_process_group_ranks(parallel.groups.mp)
        self._drawing_rank = ranks[(parallel.pipeline_size - 1) * parallel.tensor_size]
        self._draws_here = dist.get_rank() == self._drawing_rank

    def _active(self) -> slice:
        return slice(self._context.paused_request_count, self._context.total_request_count)

    @override
    def _dynamic_step_forward_logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor | None:
        """Collective over the replica: run the model; return the logits on the last stage."""
        # megatron-core would broadcast the logits to all stages. Only the drawn tokens are needed there.
        inputs = {"tokens": input_ids, "position_ids": position_ids, "attention_mask": None}
        logits: torch.Tensor | None = self.inference_wrapped_model.run_one_forward_step(inputs)
        return logits

    @override
    def _dynamic_step_sample_bookkeeping(self) -> None:
        """Skip megatron-core's groups of requests with equal sampling parameters."""
        # Every row is drawn with its own parameters, all rows at once.

    @override
    def _dynamic_step_log_probs_bookkeeping(self) -> tuple[bool, bool]:
        """Switch megatron-core's log-probs off: theirs are of the raw logits, ours come with the draw."""
        return False, False

    def _active_requests(self) -> list[int]:
        """Return the ids of the active requests."""
        # The host reads as little as it can, since it waits for the device each time. Who decodes is known from the end
        # of the step before, unless requests were added since.
        if self._context.is_decode_only() and len(self._request_ids) == self._context.get_active_request_count():
            return self._request_ids
        request_ids: list[int] = self._context.request_ids[self._active()].tolist()
        return request_ids

    @override
    def _dynamic_step_sample_logits(self, logits: torch.Tensor | None) -> None:
        """Collective over the replica: draw a token for each active request, the same on all ranks."""
        self._request_ids = self._active_requests()
        if self._parameters is None or self._parameters.request_ids != self._request_ids:
            self._draws = [self.draws[request_id] for request_id in self._request_ids]
            self._parameters = DrawParameters.of(self._request_ids, self._draws, self._stop_ids.device)
        # One broadcast for everything, in float64, which holds every token id.
        most = self._parameters.most_alternatives
        # Rows: tokens, their log-probs, then ids and log-probs of the alternatives.
        drawn = torch.empty(2 + 2 * most, len(self._draws), dtype=torch.float64, device=self._stop_ids.device)
        if self._draws_here:
            assert logits is not None
            self._draw(logits.squeeze(0), self._parameters, drawn)
        if self._model_group.size() > 1:
            dist.broadcast(drawn, src=self._drawing_rank, group=self._model_group)
        self._sampled_tokens_cuda[: len(self._draws)] = drawn[0].long()
        self._values = drawn

    def _draw(self, logits_RV: torch.Tensor, parameters: DrawParameters, drawn: torch.Tensor) -> None:
        tokens_R, log_probs_RV = sampling.draw(
            logits_RV,
            sampling.uniforms(parameters.keys_R, self._context.get_active_sequence_lengths().long()),
            temperatures_R=parameters.temperatures_R,
            top_ps_R=parameters.top_ps_R,
            vocab_size=self._vocab_size,
        )
        drawn[0], drawn[1] = tokens_R, log_probs_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1)
        most = (drawn.shape[0] - 2) // 2
        if most:
            values_RA, ids_RA = log_probs_RV.topk(most, dim=1)
            drawn[2 : 2 + most], drawn[2 + most :] = ids_RA.T, values_RA.T

    @override
    def _dynamic_step_context_bookkeeping(self) -> dict[str, torch.Tensor]:
        """End the requests that drew a stop token or were cancelled, then update the context."""
        # megatron-core compares a request's token with its one termination id. Setting this id to the drawn token ends
        # the request; -1 never does.
        sampled = self._sampled_tokens_cuda[: self._context.get_active_request_count()]
        ends = torch.isin(sampled, self._stop_ids)
        if self.cancelled:
            cancelled = [request_id in self.cancelled for request_id in self._request_ids]
            ends |= torch.tensor(cancelled, device=ends.device)
        termination = sampled.where(ends, -1)
        # The last request's token is thrown away while chunks of its prompt are to come: it cannot end the request.
        if self._context.chunked_prefill_request_id != -1:
            termination[-1] = -1
        self._request_metadata["termination_id"][self._active()] = termination
        finished: dict[str, torch.Tensor] = super()._dynamic_step_context_bookkeeping()
        self._read_step()
        return finished

    def _read_step(self) -> None:
        """Read from the device what the step drew and, at once, the order of the requests after it."""
        assert self._values is not None
        after = self._context.request_ids[self._active()]
        values = np.asarray(torch.cat((self._values.flatten(), after.double())).cpu())
        count, rows = len(self._request_ids), self._values.shape[0]
        drawn = values[: rows * count].reshape(rows, count)
        step = StepTokens(
            np.array(self._request_ids, dtype=np.int64),
            drawn[0].astype(np.int64),
            drawn[1],
            np.zeros(count, dtype=np.bool_),
            self._alternatives(drawn[2:]) if rows > 2 else {},
        )
        # megatron-core throws away the token after a chunk that does not end the prompt.
        self.drawn = step.select(step.request_ids != self._context.chunked_prefill_request_id)
        self._request_ids = values[rows * count :].astype(np.int64).tolist()

    def _alternatives(self, drawn: NDArray[np.float64]) -> dict[int, Alternatives]:
        """Return the alternatives of requests that ask for them, from rows of ids and then of log-probs."""
        ids, log_probs = np.split(drawn, 2)
        found = {}
        for column, (request_id, draw) in enumerate(zip(self._request_ids, self._draws, strict=True)):
            if most := draw.num_alternatives:
                chosen = ids[:most, column].astype(np.int64).tolist()
                found[request_id] = tuple(zip(chosen, log_probs[:most, column].tolist(), strict=True))
        return found


class _NoTokenizer:
    """A tokenizer for megatron-core, which decodes finished responses; nobody reads the text."""

    eod = -1

    def detokenize(self, _token_ids: list[int]) -> str:
        return ""
