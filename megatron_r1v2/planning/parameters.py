"""The parameters of each rank, in the order of the real model: the source of every exact number of the plan.

Nothing here builds a module, so that the plan of a 38B model takes no memory. The tests build the real modules and
compare names, shapes and bytes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from megatron_r1v2.config.choices import Part
from megatron_r1v2.config.layout import check_layout
from megatron_r1v2.models.architecture import LanguageArchitecture, R1V2Architecture, VisionArchitecture


@dataclass(frozen=True)
class Layout:
    """The split of a model over ranks."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    first_stage_layers: int = 0
    """Language layers of the first pipeline stage; 0: an even split."""
    sequence: bool = False

    @property
    def ranks(self) -> int:
        """Return the number of GPUs."""
        return self.tensor * self.pipeline * self.data

    def check(self, architecture: R1V2Architecture) -> None:
        """Raise ValueError, naming the setting and the size, where the layout does not divide the language model."""
        language = architecture.language
        check_layout(
            language.sizes,
            tensor=self.tensor,
            pipeline=self.pipeline,
            first_stage_layers=self.first_stage_layers,
        )

    def layers_of_stage(self, architecture: R1V2Architecture, stage: int) -> int:
        """Return the language layers of a pipeline stage."""
        layers = architecture.language.num_layers
        if not self.first_stage_layers:
            return layers // self.pipeline
        if stage == 0:
            return self.first_stage_layers
        return (layers - self.first_stage_layers) // (self.pipeline - 1)


@dataclass(frozen=True)
class Parameter:
    """One parameter as a rank holds it."""

    name: str
    """As in the model's `named_parameters()`; the word before the first dot is the part."""
    shape: tuple[int, ...]
    own_bucket: bool = False
    """True for the tied embeddings of a pipeline, whose gradient megatron-core reduces separately."""

    @property
    def part(self) -> Part:
        """Return its part of the model."""
        return Part(self.name.split(".", 1)[0])

    @property
    def numel(self) -> int:
        """Return its elements."""
        return math.prod(self.shape)


def whole_model_counts(architecture: R1V2Architecture) -> dict[Part, int]:
    """Count the elements of each part, without padding; their sum is the size of the HF checkpoint."""
    counts: dict[Part, int] = {}
    for parameter in stage_parameters(architecture, Layout(), 0):
        counts[parameter.part] = counts.get(parameter.part, 0) + parameter.numel
    return counts


def stage_parameters(
    architecture: R1V2Architecture, layout: Layout, stage: int, *, scores: bool = False
) -> list[Parameter]:
    """List the parameters of a rank of a pipeline stage (from 0) in the model's order.

    All tensor-parallel ranks of a stage have equal shapes.

    Args:
        scores: a reward model, with a score in place of the output layer.
    """
    front: list[Parameter] = []
    if stage == 0:
        front += [Parameter(f"vision.{name}", shape) for name, shape in _vision(architecture.vision, layout.tensor)]
        front += [Parameter(f"adapter.{name}", shape) for name, shape in _adapter(architecture, layout.tensor)]
    layers = layout.layers_of_stage(architecture, stage)
    language = list(_language(architecture.language, layout, layers, stage, scores=scores))
    is_last = stage == layout.pipeline - 1
    score = [Parameter("score.weight", (1, architecture.language.hidden_size))] if scores and is_last else []
    return front + language + score


def trained_parameters(parameters: Collection[Parameter], parts: Collection[Part]) -> list[Parameter]:
    """Return the parameters of the parts that train, in the same order."""
    return [parameter for parameter in parameters if parameter.part in parts]


def language_layer_weights(language: LanguageArchitecture) -> int:
    """Return the elements of the matrices of one decoder layer, over all ranks."""
    heads, kv = language.num_heads * language.head_size, language.num_kv_heads * language.head_size
    return language.hidden_size * (2 * heads + 2 * kv + 3 * language.ffn_size)


def padded_vision_heads(vision: VisionArchitecture, tensor: int) -> int:
    """Return the heads of the vision tower, with the zero heads that make them divisible by the TP size."""
    return math.ceil(vision.num_heads / tensor) * tensor


def padded_vocabulary(language: LanguageArchitecture, tensor: int) -> int:
    """Return the rows of the embedding, with those that make them divisible by the TP size."""
    return math.ceil(language.vocab_size / tensor) * tensor


def _vision(vision: VisionArchitecture, tensor: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    size, ffn = vision.hidden_size, vision.ffn_size // tensor
    heads = padded_vision_heads(vision, tensor) // tensor * vision.head_size
    yield "class_token", (1, 1, size)
    yield "position_embeddings", (1, vision.num_patches + 1, size)
    yield "patch_embedding.weight", (size, 3, vision.patch_size, vision.patch_size)
    yield "patch_embedding.bias", (size,)
    # Norms and scales are whole on every rank; matrices are split by TP, along the dimension that comes first or last.
    norm = ("weight",) if vision.norm == "rms_norm" else ("weight", "bias")
    for layer in range(vision.num_layers):
        prefix = f"decoder.layers.{layer}"
        yield f"{prefix}.attention_scale", (size,)
        yield f"{prefix}.mlp_scale", (size,)
        yield from ((f"{prefix}.input_layernorm.{name}", (size,)) for name in norm)
        yield f"{prefix}.self_attention.linear_proj.weight", (size, heads)
        yield f"{prefix}.self_attention.linear_proj.bias", (size,)
        yield f"{prefix}.self_attention.linear_qkv.weight", (3 * heads, size)
        if vision.qkv_bias:
            yield f"{prefix}.self_attention.linear_qkv.bias", (3 * heads,)
        if vision.qk_norm:
            yield f"{prefix}.self_attention.query_norm.weight", (heads,)
            yield f"{prefix}.self_attention.key_norm.weight", (heads,)
        yield from ((f"{prefix}.pre_mlp_layernorm.{name}", (size,)) for name in norm)
        yield f"{prefix}.mlp.linear_fc1.weight", (ffn, size)
        yield f"{prefix}.mlp.linear_fc1.bias", (ffn,)
        yield f"{prefix}.mlp.linear_fc2.weight", (size, ffn)
        yield f"{prefix}.mlp.linear_fc2.bias", (size,)


def _adapter(architecture: R1V2Architecture, tensor: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    wide, size = architecture.adapter_input_size, architecture.language.hidden_size
    yield "norm.weight", (wide,)
    yield "norm.bias", (wide,)
    yield "linear_fc1.weight", (size // tensor, wide)
    yield "linear_fc1.bias", (size // tensor,)
    yield "linear_fc2.weight", (size, size // tensor)
    yield "linear_fc2.bias", (size,)


def _language(
    language: LanguageArchitecture, layout: Layout, layers: int, stage: int, *, scores: bool
) -> Iterator[Parameter]:
    size, ffn = language.hidden_size, language.ffn_size // layout.tensor
    heads = language.num_heads * language.head_size // layout.tensor
    qkv = heads + 2 * language.num_kv_heads * language.head_size // layout.tensor
    embedding = (padded_vocabulary(language, layout.tensor) // layout.tensor, size)
    is_last = stage == layout.pipeline - 1
    own_bucket = language.tied_embeddings and layout.pipeline > 1 and not scores
    if stage == 0:
        yield Parameter("language.embedding.word_embeddings.weight", embedding, own_bucket)
    for layer in range(layers):
        prefix = f"language.decoder.layers.{layer}"
        yield Parameter(f"{prefix}.input_layernorm.weight", (size,))
        yield Parameter(f"{prefix}.self_attention.linear_proj.weight", (size, heads))
        yield Parameter(f"{prefix}.self_attention.linear_qkv.weight", (qkv, size))
        if language.qkv_bias:
            yield Parameter(f"{prefix}.self_attention.linear_qkv.bias", (qkv,))
        if language.qk_norm:
            yield Parameter(f"{prefix}.self_attention.q_layernorm.weight", (language.head_size,))
            yield Parameter(f"{prefix}.self_attention.k_layernorm.weight", (language.head_size,))
        yield Parameter(f"{prefix}.pre_mlp_layernorm.weight", (size,))
        # One matrix for both halves of SwiGLU, as megatron-core has it.
        yield Parameter(f"{prefix}.mlp.linear_fc1.weight", (2 * ffn, size))
        yield Parameter(f"{prefix}.mlp.linear_fc2.weight", (size, ffn))
    if is_last:
        yield Parameter("language.decoder.final_layernorm.weight", (size,))
        # With one stage the output layer is the embedding's own tensor; a pipeline needs a copy on its last stage.
        if not scores and (not language.tied_embeddings or layout.pipeline > 1):
            yield Parameter("language.output_layer.weight", embedding, own_bucket)
