"""megatron-core's inference classes with our image features, our sampling and our stop tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region

from megatron_r1v2.generation import sampling
from megatron_r1v2.generation.sampling import Draw
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel.groups import ParallelContext


@dataclass(frozen=True)
class PromptImages:
    """Where the image tokens of a prompt are, and what takes their place; first pipeline stage only."""

    positions_F: torch.Tensor
    """int64 [F], ascending, on the CPU: positions in the prompt that hold `<IMG_CONTEXT>`."""
    embeddings_FH: torch.Tensor
    """[F, H]: the adapter's output, in the same order."""


class ImageInferenceWrapper(GPTInferenceWrapper):
    """Runs the language model on a step's tokens, with image features in the place of image tokens."""

    def __init__(
        self,
        model: R1V2Model,
        config: InferenceWrapperConfig,
        inference_context: DynamicInferenceContext,
        parallel: ParallelContext,
    ) -> None:
        """Wrap the language model.

        Args:
            model: this rank's part.
            config: sizes and dtype for pipeline communication.
            inference_context: which tokens of which requests a step holds.
            parallel: process groups.
        """
        super().__init__(model.language, config, inference_context, parallel.groups)
        self.images: dict[int, PromptImages] = {}
        """By request id; the responses to one prompt share one object."""
        self._language = model.language
        self._tensor_group = parallel.groups.tp

    def _forward(self, inference_input: dict[str, Any]) -> torch.Tensor:
        # The callers run this under inference_mode. What is allocated then cannot be used by a later training step,
        # and megatron-core keeps some of it: rotary embeddings (an lru_cache) and sequence-parallel buffers.
        with torch.inference_mode(False), torch.no_grad():
            tokens, positions = inference_input["tokens"], inference_input["position_ids"]
            return self.model(
                tokens,
                positions,
                None,
                decoder_input=self._decoder_input(tokens, positions),
                inference_context=self.inference_context,
                runtime_gather_output=True,
            )

    def _allocate_recv_buffer(self, batch_size: int, seq_len: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return super()._allocate_recv_buffer(batch_size, seq_len)

    def _decoder_input(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return what this stage's layers start from; with FP8, megatron-core zeroes the padding in it on any stage."""
        if self._language.pre_process:
            return self._embed(tokens, positions)
        return self._language.decoder.input_tensor

    def _embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden_SBH = self._language.embedding(input_ids=tokens, position_ids=positions)
        if self.images and not self.inference_context.is_decode_only():
            self._put_images(hidden_SBH)
        if self.sequence_parallel:
            hidden_SBH = scatter_to_sequence_parallel_region(hidden_SBH, group=self._tensor_group)
        return hidden_SBH

    def _put_images(self, hidden_SBH: torch.Tensor) -> None:
        """Replace the rows of image tokens.

        A step holds some consecutive positions of each request: all of a prompt, a chunk of it, or after an eviction
        prompt and response so far. What counts is the request and the position, whatever brought them here.
        """
        context = self.inference_context
        rows = slice(context.paused_request_count, context.total_request_count)
        places, embeddings = [], []
        first_row = 0
        for request, count, start in zip(
            context.request_ids[rows].tolist(),
            context.request_query_lengths[rows].tolist(),
            context.request_kv_length_offsets[rows].tolist(),
            strict=True,
        ):
            images = self.images.get(request)
            if images is not None and count > 1:
                bounds = torch.tensor([start, start + count])
                low, high = torch.searchsorted(images.positions_F, bounds).tolist()
                places.append(images.positions_F[low:high] + (first_row - start))
                embeddings.append(images.embeddings_FH[low:high])
            first_row += count
        if places:
            index_F = torch.cat(places).to(hidden_SBH.device)
            hidden_SBH[index_F, 0] = torch.cat(embeddings).to(hidden_SBH.dtype)


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens can be drawn, and which end a response."""

    size: int
    """Ids from here on are padding."""
    stop_ids: frozenset[int]


@dataclass(frozen=True)
class DrawnToken:
    """What one step of the engine gave one request."""

    request_id: int
    token_id: int
    log_prob: float
    """Under the sampling distribution; see `sampling.draw`."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The most probable tokens with their log-probs, best first."""
    is_last: bool = False
    """The response ends here."""


class RolloutController(TextGenerationController):
    """Draws once per replica, with log-probs of the sampling distribution, and stops at any of a set of tokens."""

    def __init__(self, model: ImageInferenceWrapper, parallel: ParallelContext, vocabulary: Vocabulary) -> None:
        """Make the controller.

        Args:
            model: the wrapped model.
            parallel: process groups.
            vocabulary: what is drawn from.
        """
        super().__init__(model, _NoTokenizer(), pp_group=parallel.groups.pp)
        self.draws: dict[int, Draw] = {}
        """By request id."""
        self.cancelled: set[int] = set()
        """Requests that end with the next token they are given."""
        self.drawn: list[DrawnToken] = []
        """By the last step."""
        self._context = model.inference_context
        self._vocab_size = vocabulary.size
        self._stop_ids = torch.tensor(sorted(vocabulary.stop_ids), dtype=torch.int64, device=parallel.device)
        self._model_group = parallel.groups.mp
        # Ranks of a replica are ordered stage by stage: the first of the last stage draws for all.
        ranks = dist.get_process_group_ranks(parallel.groups.mp)
        self._drawing_rank = ranks[(parallel.pipeline_size - 1) * parallel.tensor_size]
        self._draws_here = dist.get_rank() == self._drawing_rank

    def _active(self) -> slice:
        return slice(self._context.paused_request_count, self._context.total_request_count)

    def _dynamic_step_forward_logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor | None:
        """Run the model; logits stay on the last stage: only the drawn tokens are broadcast."""
        inputs = {"tokens": input_ids, "position_ids": position_ids, "attention_mask": None}
        return self.inference_wrapped_model.run_one_forward_step(inputs)

    def _dynamic_step_sample_bookkeeping(self) -> None:
        """Do nothing: megatron-core would group requests by their sampling parameters; a row here has its own."""

    def _dynamic_step_log_probs_bookkeeping(self) -> tuple[bool, bool]:
        """Tell megatron-core to compute none: ours come with the draw."""
        return False, False

    def _dynamic_step_sample_logits(self, logits: torch.Tensor | None) -> None:
        """Draw a token for each active request and tell all ranks of the replica."""
        request_ids = self._context.request_ids[self._active()].tolist()
        draws = [self.draws[request_id] for request_id in request_ids]
        most = max(draw.num_alternatives for draw in draws)
        # Rows: the tokens, their log-probs, then the ids and the log-probs of the alternatives.
        drawn = torch.empty(2 + 2 * most, len(draws), dtype=torch.float64, device=self._stop_ids.device)
        if self._draws_here:
            assert logits is not None
            self._draw(logits.squeeze(0), draws, drawn)
        if self._model_group.size() > 1:
            dist.broadcast(drawn, src=self._drawing_rank, group=self._model_group)
        self._sampled_tokens_cuda[: len(draws)] = drawn[0].long()
        self.drawn = [
            DrawnToken(request_id, int(token), log_prob, _alternatives(rest, draw.num_alternatives))
            for request_id, draw, (token, log_prob, *rest) in zip(request_ids, draws, drawn.T.tolist(), strict=True)
            # The token after a chunk that does not end the prompt is thrown away.
            if request_id != self._context.chunked_prefill_request_id
        ]

    def _draw(self, logits_RV: torch.Tensor, draws: Sequence[Draw], drawn: torch.Tensor) -> None:
        def column(values: list[float] | list[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=drawn.device)

        keys_R = column([draw.response_key for draw in draws], torch.int64)
        tokens_R, log_probs_RV = sampling.draw(
            logits_RV,
            sampling.uniforms(keys_R, self._context.get_active_sequence_lengths().long()),
            temperatures_R=column([draw.temperature for draw in draws], torch.float32),
            top_ps_R=column([draw.top_p for draw in draws], torch.float32),
            vocab_size=self._vocab_size,
        )
        drawn[0], drawn[1] = tokens_R, log_probs_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1)
        most = (drawn.shape[0] - 2) // 2
        if most:
            values_RA, ids_RA = log_probs_RV.topk(most, dim=1)
            drawn[2 : 2 + most], drawn[2 + most :] = ids_RA.T, values_RA.T

    def _dynamic_step_context_bookkeeping(self) -> dict[str, torch.Tensor]:
        """Let a request end at any stop token, or because it was cancelled: megatron-core compares with one id each.

        The id is set to the token itself where the request ends. Not for a prompt of which a chunk is still to come:
        its token is thrown away.
        """
        sampled = self._sampled_tokens_cuda[: self._context.get_active_request_count()]
        ends = torch.isin(sampled, self._stop_ids)
        if self.cancelled:
            active = self._context.request_ids[self._active()].tolist()
            ends |= torch.tensor([request_id in self.cancelled for request_id in active], device=ends.device)
        termination = sampled.where(ends, -1)
        if self._context.chunked_prefill_request_id != -1:
            termination[-1] = -1
        self._request_metadata["termination_id"][self._active()] = termination
        return super()._dynamic_step_context_bookkeeping()


def _alternatives(rest: Sequence[float], count: int) -> tuple[tuple[int, float], ...]:
    most = len(rest) // 2
    return tuple((int(token), log_prob) for token, log_prob in zip(rest[:count], rest[most:][:count], strict=True))


class _NoTokenizer:
    """megatron-core turns finished responses into text; nobody reads it, since rollouts carry ids."""

    eod = -1

    def detokenize(self, token_ids: list[int]) -> str:
        return ""
