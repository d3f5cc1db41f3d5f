"""The two-way table between our parameters and Hugging Face's: one row a parameter, read in both directions.

A row names our parameter, its Hugging Face tensors and an invertible operation (`hf_operations`). Loading, exporting
and the tensor-parallel split of both follow from the rows; nothing else in the package knows a Hugging Face name.
`{n}` stands for a layer of the part that the name starts with, counted over the whole model and not the stage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_r1v2.models.architecture import R1V2Architecture
from megatron_r1v2.models.hf_operations import GroupedQKV, Operation, Replicated, Split, Stacked

Layout = Literal["transformers"]
"""Column of the table to use. transformers: what its InternVLForConditionalGeneration saves and loads."""


@dataclass(frozen=True)
class MappedParameter:
    """One row of the table, for one layer of one architecture."""

    ours: str
    """Our name in the whole model."""
    hf: tuple[str, ...]
    """The Hugging Face tensors it is made from."""
    operation: Operation
    exported: bool = True
    """False for a copy, which is filled on load but not written."""

    def to_shard(self, tensors: Mapping[str, torch.Tensor], *, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """Return what one tensor-parallel rank holds.

        Args:
            tensors: at least the tensors named in `hf`.
            tensor_rank: which shard.
            tensor_size: how many shards there are.

        Raises:
            ValueError: a tensor has not the shape that config.json implies.
        """
        chosen = [tensors[name] for name in self.hf]
        try:
            return self.operation.to_shard(chosen, tensor_rank=tensor_rank, tensor_size=tensor_size)
        except ValueError as error:
            shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in self.hf)
            raise ValueError(f"{shapes}: {error}; the weights do not belong to this config.json") from error

    def to_hf(self, shards: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the Hugging Face tensors by name.

        Args:
            shards: those of all tensor-parallel ranks, in rank order.
        """
        return dict(zip(self.hf, self.operation.to_hf(shards), strict=True))


def parameter_map(architecture: R1V2Architecture, layout: Layout = "transformers") -> tuple[MappedParameter, ...]:
    """Return the table's rows for an architecture, layers written out.

    Args:
        architecture: sizes and variants; decides which rows exist.
        layout: the Hugging Face side.

    Raises:
        ValueError: the layout cannot hold this model.
    """
    if layout != "transformers":
        raise ValueError(f"layout={layout!r} is not known; accepted: 'transformers'")
    if architecture.pixel_shuffle != "v2":
        raise ValueError(
            f"pixel_shuffle={architecture.pixel_shuffle!r} cannot be written in the layout of transformers, which "
            "computes v2 only and would mix up the image; accepted: 'v2'"
        )
    layers = {"vision": architecture.vision.num_layers, "language": architecture.language.num_layers}
    mapped = []
    for row in _TABLE:
        if not row.when(architecture):
            continue
        operation = row.operation(architecture)
        numbers = range(layers[row.ours.split(".")[0]]) if "{n}" in row.ours else range(1)
        for n in numbers:
            names = tuple(name.replace("{n}", str(n)) for name in row.transformers)
            mapped.append(MappedParameter(row.ours.replace("{n}", str(n)), names, operation, row.exported))
    return tuple(mapped)


def shards_from_hf(
    parameters: Iterable[MappedParameter], tensors: Mapping[str, torch.Tensor], *, tensor_rank: int, tensor_size: int
) -> dict[str, torch.Tensor]:
    """Return all that one tensor-parallel rank holds, by our names; arithmetic only."""
    return {
        parameter.ours: parameter.to_shard(tensors, tensor_rank=tensor_rank, tensor_size=tensor_size)
        for parameter in parameters
    }


def hf_from_shards(
    parameters: Iterable[MappedParameter], shards: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return all Hugging Face tensors from what the tensor-parallel ranks hold, in rank order; arithmetic only."""
    tensors: dict[str, torch.Tensor] = {}
    for parameter in parameters:
        if parameter.exported:
            tensors.update(parameter.to_hf([shard[parameter.ours] for shard in shards]))
    return tensors


def canonical_hf_name(name: str) -> str:
    """Return a tensor's name as transformers saves it, from that or from the name inside the model.

    Checkpoints exist with either; transformers loads both.
    """
    for inside, saved in _INSIDE_TO_SAVED:
        name = re.sub(inside, saved, name)
    return name


def hf_leftovers(architecture: R1V2Architecture, hf_names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Compare a checkpoint's tensors with the table.

    Args:
        architecture: of the model.
        hf_names: canonical names of the tensors that the checkpoint has.

    Returns:
        The names that no row reads, and the names that are read but not there. The output matrix of a model with tied
        embeddings is in neither: some checkpoints repeat it.
    """
    read = {name for parameter in parameter_map(architecture) for name in parameter.hf}
    found = set(hf_names)
    repeated = {HF_OUTPUT} if architecture.language.tied_embeddings else set()
    return sorted(found - read - repeated), sorted(read - found)


# --- the table ---------------------------------------------------------------------------------------------------

OperationOf = Callable[[R1V2Architecture], Operation]


@dataclass(frozen=True)
class _Row:
    ours: str
    transformers: tuple[str, ...]
    # A second layout (InternVL-chat: joined qkv, mlp1) is a second column with operations of its own.
    operation: OperationOf
    when: Callable[[R1V2Architecture], bool] = lambda _: True
    exported: bool = True


def _whole(_: R1V2Architecture) -> Operation:
    return Replicated()


def _vision_qkv(architecture: R1V2Architecture) -> Operation:
    return GroupedQKV(architecture.vision.num_heads, 1, architecture.vision.head_size, padded=True)


def _vision_heads(dim: int) -> OperationOf:
    return lambda model: Split(dim, model.vision.num_heads, model.vision.head_size, padded=True)


def _vision_mlp(dim: int) -> OperationOf:
    return lambda model: Split(dim, model.vision.ffn_size)


def _adapter_mlp(dim: int) -> OperationOf:
    return lambda model: Split(dim, model.language.hidden_size)


def _language_qkv(architecture: R1V2Architecture) -> Operation:
    language = architecture.language
    return GroupedQKV(language.num_kv_heads, language.num_heads // language.num_kv_heads, language.head_size)


def _language_heads(architecture: R1V2Architecture) -> Operation:
    return Split(1, architecture.language.num_heads, architecture.language.head_size)


def _language_gated(architecture: R1V2Architecture) -> Operation:
    return Stacked(architecture.language.ffn_size)


def _language_down(architecture: R1V2Architecture) -> Operation:
    return Split(1, architecture.language.ffn_size)


def _vocabulary(architecture: R1V2Architecture) -> Operation:
    return Split(0, architecture.language.vocab_size, padded=True)


def _vision_layer_norm(architecture: R1V2Architecture) -> bool:
    return architecture.vision.norm == "layer_norm"


def _vision_qkv_bias(architecture: R1V2Architecture) -> bool:
    return architecture.vision.qkv_bias


def _vision_qk_norm(architecture: R1V2Architecture) -> bool:
    return architecture.vision.qk_norm


def _language_qkv_bias(architecture: R1V2Architecture) -> bool:
    return architecture.language.qkv_bias


def _language_qk_norm(architecture: R1V2Architecture) -> bool:
    return architecture.language.qk_norm


def _tied(architecture: R1V2Architecture) -> bool:
    return architecture.language.tied_embeddings


def _untied(architecture: R1V2Architecture) -> bool:
    return not architecture.language.tied_embeddings


def _qkv(pattern: str) -> tuple[str, ...]:
    return tuple(pattern.replace("*", letter) for letter in "qkv")


_V = "vision.decoder.layers.{n}."
_VH = "vision_tower.encoder.layer.{n}."
_L = "language.decoder.layers.{n}."
_LH = "language_model.model.layers.{n}."
HF_EMBEDDING = "language_model.model.embed_tokens.weight"
HF_OUTPUT = "language_model.lm_head.weight"
OUTPUT_LAYER = "language.output_layer.weight"
# The one parameter without a Hugging Face name: the layout of transformers has no reward model.
SCORE_HEAD = "score.weight"

_TABLE: tuple[_Row, ...] = (
    _Row("vision.class_token", ("vision_tower.embeddings.cls_token",), _whole),
    _Row("vision.patch_embedding.weight", ("vision_tower.embeddings.patch_embeddings.projection.weight",), _whole),
    _Row("vision.patch_embedding.bias", ("vision_tower.embeddings.patch_embeddings.projection.bias",), _whole),
    _Row("vision.position_embeddings", ("vision_tower.embeddings.position_embeddings",), _whole),
    _Row(_V + "input_layernorm.weight", (_VH + "layernorm_before.weight",), _whole),
    _Row(_V + "input_layernorm.bias", (_VH + "layernorm_before.bias",), _whole, _vision_layer_norm),
    _Row(_V + "self_attention.linear_qkv.weight", _qkv(_VH + "attention.*_proj.weight"), _vision_qkv),
    _Row(_V + "self_attention.linear_qkv.bias", _qkv(_VH + "attention.*_proj.bias"), _vision_qkv, _vision_qkv_bias),
    _Row(
        _V + "self_attention.query_norm.weight", (_VH + "attention.q_norm.weight",), _vision_heads(0), _vision_qk_norm
    ),
    _Row(_V + "self_attention.key_norm.weight", (_VH + "attention.k_norm.weight",), _vision_heads(0), _vision_qk_norm),
    _Row(_V + "self_attention.linear_proj.weight", (_VH + "attention.projection_layer.weight",), _vision_heads(1)),
    _Row(_V + "self_attention.linear_proj.bias", (_VH + "attention.projection_layer.bias",), _whole),
    _Row(_V + "attention_scale", (_VH + "lambda_1",), _whole),
    _Row(_V + "pre_mlp_layernorm.weight", (_VH + "layernorm_after.weight",), _whole),
    _Row(_V + "pre_mlp_layernorm.bias", (_VH + "layernorm_after.bias",), _whole, _vision_layer_norm),
    _Row(_V + "mlp.linear_fc1.weight", (_VH + "mlp.fc1.weight",), _vision_mlp(0)),
    _Row(_V + "mlp.linear_fc1.bias", (_VH + "mlp.fc1.bias",), _vision_mlp(0)),
    _Row(_V + "mlp.linear_fc2.weight", (_VH + "mlp.fc2.weight",), _vision_mlp(1)),
    _Row(_V + "mlp.linear_fc2.bias", (_VH + "mlp.fc2.bias",), _whole),
    _Row(_V + "mlp_scale", (_VH + "lambda_2",), _whole),
    _Row("adapter.norm.weight", ("multi_modal_projector.layer_norm.weight",), _whole),
    _Row("adapter.norm.bias", ("multi_modal_projector.layer_norm.bias",), _whole),
    _Row("adapter.linear_fc1.weight", ("multi_modal_projector.linear_1.weight",), _adapter_mlp(0)),
    _Row("adapter.linear_fc1.bias", ("multi_modal_projector.linear_1.bias",), _adapter_mlp(0)),
    _Row("adapter.linear_fc2.weight", ("multi_modal_projector.linear_2.weight",), _adapter_mlp(1)),
    _Row("adapter.linear_fc2.bias", ("multi_modal_projector.linear_2.bias",), _whole),
    _Row("language.embedding.word_embeddings.weight", (HF_EMBEDDING,), _vocabulary),
    _Row(_L + "input_layernorm.weight", (_LH + "input_layernorm.weight",), _whole),
    _Row(_L + "self_attention.linear_qkv.weight", _qkv(_LH + "self_attn.*_proj.weight"), _language_qkv),
    _Row(_L + "self_attention.linear_qkv.bias", _qkv(_LH + "self_attn.*_proj.bias"), _language_qkv, _language_qkv_bias),
    _Row(_L + "self_attention.q_layernorm.weight", (_LH + "self_attn.q_norm.weight",), _whole, _language_qk_norm),
    _Row(_L + "self_attention.k_layernorm.weight", (_LH + "self_attn.k_norm.weight",), _whole, _language_qk_norm),
    _Row(_L + "self_attention.linear_proj.weight", (_LH + "self_attn.o_proj.weight",), _language_heads),
    _Row(_L + "pre_mlp_layernorm.weight", (_LH + "post_attention_layernorm.weight",), _whole),
    _Row(_L + "mlp.linear_fc1.weight", (_LH + "mlp.gate_proj.weight", _LH + "mlp.up_proj.weight"), _language_gated),
    _Row(_L + "mlp.linear_fc2.weight", (_LH + "mlp.down_proj.weight",), _language_down),
    _Row("language.decoder.final_layernorm.weight", ("language_model.model.norm.weight",), _whole),
    _Row(OUTPUT_LAYER, (HF_OUTPUT,), _vocabulary, _untied),
    # Tied embeddings: the last of several stages needs a copy, which one stage alone has not.
    _Row(OUTPUT_LAYER, (HF_EMBEDDING,), _vocabulary, _tied, exported=False),
)

# transformers 5 keeps the names of its first InternVL release in files and renames on load and save.
_INSIDE_TO_SAVED: tuple[tuple[str, str], ...] = (
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
)
