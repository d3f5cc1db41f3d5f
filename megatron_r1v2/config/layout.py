"""Checks of a language model's sizes against a layout: plain numbers in, a sentence that names the setting out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from megatron_r1v2.config.choices import Fp8


class UnevenSizes(ValueError):
    """A layout that does not divide the sizes of a model; transformers loads it: see `Unsupported` in checkpoint/."""

    kind: Final = "uneven sizes"


@dataclass(frozen=True)
class LanguageSizes:
    """The sizes of a language model that a layout must fit."""

    heads: int
    kv_heads: int
    head_size: int
    """Channels of a head."""
    hidden: int
    """Channels."""
    ffn: int
    """Feed-forward channels."""
    layers: int


def check_fp8_shapes(sizes: LanguageSizes, *, fp8: Fp8, tensor: int, sequence: bool) -> None:
    """Check TransformerEngine's constraints on the products of one rank before anything is built.

    Raises:
        UnevenSizes: naming the dimension that does not fit.
    """
    if fp8 is Fp8.none:
        return
    multiple = 128 if fp8 is Fp8.blockwise and sequence else 16
    for what, size in (
        ("channels (hidden_size)", sizes.hidden),
        ("feed-forward channels of a rank (intermediate_size / parallel.tensor)", sizes.ffn // tensor),
        ("query channels of a rank (heads x head size / parallel.tensor)", sizes.heads * sizes.head_size // tensor),
        ("query, key and value channels of a rank", (sizes.heads + 2 * sizes.kv_heads) * sizes.head_size // tensor),
    ):
        if size % multiple:
            raise UnevenSizes(
                f"model.fp8={fp8.value} needs a multiple of {multiple}, but the language model has {size} "
                f"{what} at parallel.tensor={tensor}; lower parallel.tensor, or set model.fp8=none"
            )


def check_layout(sizes: LanguageSizes, *, tensor: int, pipeline: int, first_stage_layers: int) -> None:
    """Check that a layout divides the sizes of a language model.

    Raises:
        UnevenSizes: naming the setting and the size that it does not divide.
    """
    for mistake in (*tensor_mistakes(sizes, tensor), *pipeline_mistakes(sizes, pipeline, first_stage_layers)):
        raise UnevenSizes(mistake)


def tensor_mistakes(sizes: LanguageSizes, tensor: int) -> Iterator[str]:
    """Yield a sentence when tensor parallelism does not divide a size: the first of them, as one value mends all."""
    for what, size in (
        ("attention heads (num_attention_heads)", sizes.heads),
        ("channels (hidden_size)", sizes.hidden),
        ("feed-forward channels (intermediate_size)", sizes.ffn),
    ):
        if size % tensor:
            fitting = [n for n in range(1, sizes.heads + 1) if all(s % n == 0 for s in (sizes.heads, size))]
            yield (
                f"parallel.tensor={tensor} does not divide the language model's {size} {what}; "
                f"values that do: {', '.join(map(str, fitting))}"
            )
            return
    if sizes.kv_heads % tensor and tensor % sizes.kv_heads:
        yield (
            f"parallel.tensor={tensor} and the language model's {sizes.kv_heads} key-value heads (num_key_value_heads) "
            "do not divide each other; choose a divisor or a multiple of the heads"
        )


def pipeline_mistakes(sizes: LanguageSizes, stages: int, first: int) -> Iterator[str]:
    """Yield a sentence when the layers are not divided evenly over the stages behind the first.

    Args:
        first: layers of the first stage; 0: an even split.
    """
    layers = sizes.layers
    if first and stages == 1:
        yield (
            f"parallel.first_stage_layers={first} needs more than one pipeline stage but parallel.pipeline=1; "
            "set parallel.first_stage_layers=0"
        )
    elif first >= layers:
        yield f"parallel.first_stage_layers={first} leaves none of the {layers} layers to the other stages; lower it"
    elif first and (layers - first) % (stages - 1):
        yield (
            f"parallel.first_stage_layers={first} leaves {layers - first} of {layers} layers for "
            f"{stages - 1} further stages, which does not divide; change it or parallel.pipeline"
        )
    elif not first and layers % stages:
        yield (
            f"parallel.pipeline={stages} does not divide the language model's {layers} layers (num_hidden_layers); "
            "choose a divisor, or set parallel.first_stage_layers"
        )
