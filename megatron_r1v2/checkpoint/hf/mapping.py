"""The two-way table between our parameters and Hugging Face's: one row a parameter, read in both directions.

A row names our parameter, its Hugging Face tensors and an invertible operation (`operations.py`). Loading, exporting
and the tensor-parallel split of both follow from the rows; nothing else in the package knows a Hugging Face name.
`{n}` stands for a layer of the part that the name starts with, counted over the whole model and not the stage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_r1v2.checkpoint.hf.operations import GroupedQKV, JoinedQKV, Operation, Replicated, Split, Stacked
from megatron_r1v2.models.architecture import R1V2Architecture

Layout = Literal["transformers", "chat"]
"""Column of the table to use. transformers: what its InternVLForConditionalGeneration saves and loads. chat: what
OpenGVLab's InternVL and Skywork's R1V folders hold (`vision_model.*`, `mlp1.*`), and what vLLM reads from them."""
LAYOUTS: tuple[Layout, ...] = ("transformers", "chat")


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

        Raises:
            ValueError: a tensor has not the shape that config.json implies.
        """
        with self._named(tensors):
            chosen = [tensors[name] for name in self.hf]
            return self.operation.to_shard(chosen, tensor_rank=tensor_rank, tensor_size=tensor_size)

    def blocks(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return the whole parameter as blocks of its rows, without a copy.

        Raises:
            ValueError: a tensor has not the shape that config.json implies.
        """
        with self._named(tensors):
            return self.operation.blocks([tensors[name] for name in self.hf])

    @contextmanager
    def _named(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        try:
            yield
        except (ValueError, RuntimeError) as error:  # torch's own, where tensors of one row do not go together
            shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in self.hf)
            raise ValueError(f"{shapes}: {error}; the weights do not belong to this config.json") from error

    def to_hf(self, shards: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the Hugging Face tensors by name."""
        return dict(zip(self.hf, self.operation.to_hf(shards), strict=True))

    def hf_blocks(self, whole: torch.Tensor) -> tuple[list[torch.Tensor], ...]:
        """Return each Hugging Face tensor as blocks of its rows, without a copy."""
        return self.operation.hf_blocks(whole)


def parameter_map(architecture: R1V2Architecture, layout: Layout = "transformers") -> tuple[MappedParameter, ...]:
    """Return the table's rows for an architecture, layers written out.

    Raises:
        ValueError: the layout cannot hold this model.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not known; accepted: {', '.join(map(repr, LAYOUTS))}")
    if layout == "transformers" and architecture.pixel_shuffle != "v2":
        raise ValueError(
            f"pixel_shuffle={architecture.pixel_shuffle!r} cannot be written in the layout of transformers, which "
            "computes v2 only and would mix up the image; accepted: 'v2', or the layout 'chat'"
        )
    layers = {"vision": architecture.vision.num_layers, "language": architecture.language.num_layers}
    mapped = []
    for row in _TABLE:
        if not row.when(architecture):
            continue
        hf, operation_of = row.column(layout)
        operation = operation_of(architecture)
        numbers = range(layers[row.ours.split(".")[0]]) if "{n}" in row.ours else range(1)
        for n in numbers:
            names = tuple(name.replace("{n}", str(n)) for name in hf)
            mapped.append(MappedParameter(row.ours.replace("{n}", str(n)), names, operation, row.exported))
    return tuple(mapped)


def canonical_hf_name(name: str) -> str:
    """Return a tensor's name as transformers saves it, from that or from the name inside the model.

    Checkpoints exist with either; transformers loads both.
    """
    for inside, saved in _INSIDE_TO_SAVED:
        name = re.sub(inside, saved, name)
    return name


def stored_names(names: Iterable[str], layout: Layout, *, tied: bool) -> dict[str, str]:
    """Return the table's name of each tensor in a file, and the name that it has there.

    A model with tied embeddings may be stored by its output matrix alone, which is its embedding then.
    """
    stored = {canonical_hf_name(name) if layout == "transformers" else name: name for name in names}
    if tied and HF_EMBEDDING not in stored and HF_OUTPUT in stored:
        stored[HF_EMBEDDING] = stored.pop(HF_OUTPUT)
    return stored


def hf_leftovers(
    architecture: R1V2Architecture, hf_names: Iterable[str], layout: Layout = "transformers"
) -> tuple[list[str], list[str]]:
    """Compare a checkpoint's tensors with the table.

    Args:
        hf_names: canonical names of the tensors that the checkpoint has.

    Returns:
        The names that no row reads, and those that the checkpoint lacks. The output matrix of a model with tied
        embeddings is in neither: some checkpoints repeat it.
    """
    read = {name for parameter in parameter_map(architecture, layout) for name in parameter.hf}
    found = set(hf_names)
    repeated = {HF_OUTPUT} if architecture.language.tied_embeddings else set()
    return sorted(found - read - repeated), sorted(read - found)


# --- the table ---------------------------------------------------------------------------------------------------

OperationOf = Callable[[R1V2Architecture], Operation]


@dataclass(frozen=True)
class _Row:
    ours: str
    transformers: tuple[str, ...]
    chat: tuple[str, ...]
    operation: OperationOf
    when: Callable[[R1V2Architecture], bool] = lambda _: True
    exported: bool = True
    chat_operation: OperationOf | None = None
    """Where the second layout is not only another name."""

    def column(self, layout: Layout) -> tuple[tuple[str, ...], OperationOf]:
        if layout == "transformers":
            return self.transformers, self.operation
        return self.chat, self.chat_operation or self.operation


def _whole(_: R1V2Architecture) -> Operation:
    return Replicated()


def _vision_qkv(architecture: R1V2Architecture) -> Operation:
    return GroupedQKV(architecture.vision.num_heads, 1, architecture.vision.head_size, padded=True)


def _vision_joined_qkv(architecture: R1V2Architecture) -> Operation:
    return JoinedQKV(GroupedQKV(architecture.vision.num_heads, 1, architecture.vision.head_size, padded=True))


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


HF_EMBEDDING = "language_model.model.embed_tokens.weight"
HF_OUTPUT = "language_model.lm_head.weight"
# The one parameter without a Hugging Face name: the layout of transformers has no reward model.
SCORE_HEAD = "score.weight"


def _vision(
    ours: str, transformers: str | tuple[str, ...], chat: str, operation: OperationOf = _whole, **more: Any
) -> _Row:
    names = (transformers,) if isinstance(transformers, str) else transformers
    return _Row(
        f"vision.{ours}", tuple(f"vision_tower.{n}" for n in names), (f"vision_model.{chat}",), operation, **more
    )


def _vision_layer(ours: str, transformers: str | tuple[str, ...], chat: str, *operation: Any, **more: Any) -> _Row:
    names = (transformers,) if isinstance(transformers, str) else transformers
    hf = tuple(f"encoder.layer.{{n}}.{name}" for name in names)
    return _vision(f"decoder.layers.{{n}}.{ours}", hf, f"encoder.layers.{{n}}.{chat}", *operation, **more)


def _adapter(ours: str, transformers: str, chat: str, operation: OperationOf = _whole) -> _Row:
    return _Row(f"adapter.{ours}", (f"multi_modal_projector.{transformers}",), (f"mlp1.{chat}",), operation)


def _language(ours: str, hf: str | tuple[str, ...], operation: OperationOf, *more: Any, **options: Any) -> _Row:
    """Both layouts keep the language model's own names below one prefix."""
    names = tuple(f"language_model.{name}" for name in ((hf,) if isinstance(hf, str) else hf))
    return _Row(f"language.{ours}", names, names, operation, *more, **options)


def _language_layer(ours: str, hf: str | tuple[str, ...], operation: OperationOf = _whole, *more: Any) -> _Row:
    names = (hf,) if isinstance(hf, str) else hf
    below = tuple(f"model.layers.{{n}}.{name}" for name in names)
    return _language(f"decoder.layers.{{n}}.{ours}", below, operation, *more)


_JOINED: dict[str, Any] = {"chat_operation": _vision_joined_qkv}
_TABLE: tuple[_Row, ...] = (
    _vision("class_token", "embeddings.cls_token", "embeddings.class_embedding"),
    _vision(
        "patch_embedding.weight",
        "embeddings.patch_embeddings.projection.weight",
        "embeddings.patch_embedding.weight",
    ),
    _vision("patch_embedding.bias", "embeddings.patch_embeddings.projection.bias", "embeddings.patch_embedding.bias"),
    _vision("position_embeddings", "embeddings.position_embeddings", "embeddings.position_embedding"),
    _vision_layer("input_layernorm.weight", "layernorm_before.weight", "norm1.weight"),
    _vision_layer("input_layernorm.bias", "layernorm_before.bias", "norm1.bias", _whole, when=_vision_layer_norm),
    _vision_layer(
        "self_attention.linear_qkv.weight", _qkv("attention.*_proj.weight"), "attn.qkv.weight", _vision_qkv, **_JOINED
    ),
    _vision_layer(
        "self_attention.linear_qkv.bias",
        _qkv("attention.*_proj.bias"),
        "attn.qkv.bias",
        _vision_qkv,
        when=_vision_qkv_bias,
        **_JOINED,
    ),
    _vision_layer(
        "self_attention.query_norm.weight",
        "attention.q_norm.weight",
        "attn.q_norm.weight",
        _vision_heads(0),
        when=_vision_qk_norm,
    ),
    _vision_layer(
        "self_attention.key_norm.weight",
        "attention.k_norm.weight",
        "attn.k_norm.weight",
        _vision_heads(0),
        when=_vision_qk_norm,
    ),
    _vision_layer(
        "self_attention.linear_proj.weight",
        "attention.projection_layer.weight",
        "attn.proj.weight",
        _vision_heads(1),
    ),
    _vision_layer("self_attention.linear_proj.bias", "attention.projection_layer.bias", "attn.proj.bias"),
    _vision_layer("attention_scale", "lambda_1", "ls1"),
    _vision_layer("pre_mlp_layernorm.weight", "layernorm_after.weight", "norm2.weight"),
    _vision_layer("pre_mlp_layernorm.bias", "layernorm_after.bias", "norm2.bias", _whole, when=_vision_layer_norm),
    _vision_layer("mlp.linear_fc1.weight", "mlp.fc1.weight", "mlp.fc1.weight", _vision_mlp(0)),
    _vision_layer("mlp.linear_fc1.bias", "mlp.fc1.bias", "mlp.fc1.bias", _vision_mlp(0)),
    _vision_layer("mlp.linear_fc2.weight", "mlp.fc2.weight", "mlp.fc2.weight", _vision_mlp(1)),
    _vision_layer("mlp.linear_fc2.bias", "mlp.fc2.bias", "mlp.fc2.bias"),
    _vision_layer("mlp_scale", "lambda_2", "ls2"),
    _adapter("norm.weight", "layer_norm.weight", "0.weight"),
    _adapter("norm.bias", "layer_norm.bias", "0.bias"),
    _adapter("linear_fc1.weight", "linear_1.weight", "1.weight", _adapter_mlp(0)),
    _adapter("linear_fc1.bias", "linear_1.bias", "1.bias", _adapter_mlp(0)),
    _adapter("linear_fc2.weight", "linear_2.weight", "3.weight", _adapter_mlp(1)),
    _adapter("linear_fc2.bias", "linear_2.bias", "3.bias"),
    _language("embedding.word_embeddings.weight", "model.embed_tokens.weight", _vocabulary),
    _language_layer("input_layernorm.weight", "input_layernorm.weight"),
    _language_layer("self_attention.linear_qkv.weight", _qkv("self_attn.*_proj.weight"), _language_qkv),
    _language_layer("self_attention.linear_qkv.bias", _qkv("self_attn.*_proj.bias"), _language_qkv, _language_qkv_bias),
    _language_layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", _whole, _language_qk_norm),
    _language_layer("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", _whole, _language_qk_norm),
    _language_layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight", _language_heads),
    _language_layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    _language_layer("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), _language_gated),
    _language_layer("mlp.linear_fc2.weight", "mlp.down_proj.weight", _language_down),
    _language("decoder.final_layernorm.weight", "model.norm.weight", _whole),
    _language("output_layer.weight", "lm_head.weight", _vocabulary, _untied),
    # Tied embeddings: the last of several stages needs a copy, which one stage alone has not.
    _language("output_layer.weight", "model.embed_tokens.weight", _vocabulary, _tied, exported=False),
)

# transformers 5 keeps the names of its first InternVL release in files and renames on load and save.
_INSIDE_TO_SAVED: tuple[tuple[str, str], ...] = (
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
)
