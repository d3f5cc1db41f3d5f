"""The language model: megatron-core's GPTModel with sizes from an HF configuration."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from typing_extensions import override

from megatron_r1v2.config.choices import Layers
from megatron_r1v2.config.layout import check_layout
from megatron_r1v2.models.architecture import LanguageArchitecture
from megatron_r1v2.models.layer_specs import language_block_spec
from megatron_r1v2.models.rotary import StretchedRotaryEmbedding, softmax_scale
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.models.shared_attention import SharedRowParams


def padded_vocab_size(architecture: LanguageArchitecture, tensor_size: int) -> int:
    """Return the vocabulary size, padded to a multiple of the tensor-parallel ranks."""
    return math.ceil(architecture.vocab_size / tensor_size) * tensor_size


def language_transformer_config(architecture: LanguageArchitecture, settings: ComputeSettings) -> TransformerConfig:
    """Make megatron-core's configuration of the language model.

    Raises:
        ValueError: the layout does not divide heads, MLP or layers; or `model.transformer_config` is refused.
    """
    check_layout(
        architecture.sizes,
        tensor=settings.tensor,
        pipeline=settings.pipeline,
        first_stage_layers=settings.first_stage_layers,
    )
    arguments: dict[str, object] = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "num_attention_heads": architecture.num_heads,
        "num_query_groups": architecture.num_kv_heads,
        "kv_channels": architecture.head_size,
        "ffn_hidden_size": architecture.ffn_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": architecture.norm_epsilon,
        "softmax_scale": softmax_scale(architecture),
        "add_bias_linear": False,
        "add_qkv_bias": architecture.qkv_bias,
        # Each rank has some of the heads, so megatron-core sums the gradients of these norms over the ranks.
        "qk_layernorm": architecture.qk_norm,
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "pipeline_model_parallel_size": settings.pipeline,
        "num_layers_in_first_pipeline_stage": settings.first_stage_layers or None,
        "sequence_parallel": settings.sequence,
        # Microbatches differ in length, so pipeline stages have to send each other the shapes.
        "variable_seq_lengths": settings.pipeline > 1,
        # The model has no experts, but megatron-core refuses variable lengths with its default dispatcher.
        "moe_token_dispatcher_type": "alltoall",
        **settings.shared_arguments(),
        "bias_activation_fusion": settings.fused,
        "bias_dropout_fusion": settings.fused,
        **settings.fp8_arguments(),
    }
    # Last, so that `model.transformer_config` can replace anything above.
    arguments |= settings.language_overrides
    try:
        return TransformerConfig(**arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"megatron-core refuses the language model's TransformerConfig: {error}; "
            f"check model.transformer_config={dict(settings.language_overrides)} and the parallel section"
        ) from error


class LanguageModel(GPTModel):
    """megatron-core's GPTModel, whose output layer reads the response tokens of a shared row only."""

    @override
    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        *args: object,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        if self.post_process and isinstance(packed_seq_params, SharedRowParams):
            assert packed_seq_params.responses is not None
            return self._logits_at(hidden_states, packed_seq_params.responses)
        output: torch.Tensor = super()._postprocess(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)
        return output

    def _logits_at(self, hidden_S1H: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Collective over the tensor-parallel ranks: compute the logits of some tokens as [1, tokens, V / TP]."""
        layer = self.output_layer
        scattered = layer.sequence_parallel
        if scattered:
            # Without sequence parallelism the output layer adds the gradients of all ranks itself, so each takes its
            # part of the sum back; a reduce-scatter would add equal sums, and be too large by TP.
            hidden_S1H = gather_from_sequence_parallel_region(
                hidden_S1H, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        # As megatron-core does it for the last tokens of a generation step.
        layer.sequence_parallel = False
        logits, _ = layer(hidden_S1H.index_select(0, tokens), weight=weight)
        layer.sequence_parallel = scattered
        output: torch.Tensor = logits.transpose(0, 1)
        return output


def build_language_model(
    architecture: LanguageArchitecture,
    config: TransformerConfig,
    *,
    layers: Layers,
    groups: ProcessGroupCollection,
    pre_process: bool,
    post_process: bool,
    output_layer: bool = True,
) -> LanguageModel:
    """Build this pipeline stage's part of the decoder.

    Args:
        config: from `language_transformer_config`.
        pre_process: this stage holds the embedding.
        post_process: this stage holds the final norm and the output layer.
        output_layer: False makes the last stage return the hidden states after the final norm.

    Returns:
        The model. Its embedding returns the whole sequence, also under sequence parallelism.
    """
    model = LanguageModel(
        config=config,
        transformer_layer_spec=language_block_spec(architecture, config, layers=layers, groups=groups),
        vocab_size=padded_vocab_size(architecture, config.tensor_model_parallel_size),
        max_sequence_length=architecture.max_positions,
        pre_process=pre_process,
        post_process=post_process,
        # Each rank keeps its part of the vocabulary: gathered logits would be the largest tensor of a step.
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.tied_embeddings and output_layer,
        position_embedding_type="rope",
        rotary_base=architecture.rope_theta,
        # Image features go in before the sequence is scattered (see R1V2Model.embed).
        scatter_embedding_sequence_parallel=False,
        pg_collection=groups,
    )
    if architecture.rope_type != "default":
        model.rotary_pos_emb = StretchedRotaryEmbedding(architecture, model.rotary_pos_emb)
    if post_process and not output_layer:
        # GPTModel has no argument for a decoder with a final norm but without an output layer. The decoder is built by
        # now, so from here on `post_process` controls the output layer only.
        del model.output_layer
        model.post_process = False
    return model
