"""Weights between a Hugging Face folder and a model that is spread over tensor- and pipeline-parallel ranks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_r1v2.checkpoint.hf.config import are_tied
from megatron_r1v2.checkpoint.hf.folders import SafetensorsFolder
from megatron_r1v2.checkpoint.hf.mapping import (
    HF_EMBEDDING,
    HF_OUTPUT,
    SCORE_HEAD,
    Layout,
    MappedParameter,
    hf_leftovers,
    parameter_map,
    stored_names,
)
from megatron_r1v2.checkpoint.hf.refusals import Unsupported, check_tensors
from megatron_r1v2.models.architecture import FUSED_NORM_NAMES, R1V2Architecture
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel.groups import ParallelContext


def check_hf_tensors(hf_path: Path | str, architecture: R1V2Architecture, layout: Layout) -> None:
    """Refuse a folder that has not the tensors of a model, before memory is taken for one.

    Raises:
        ValueError: the folder cannot be read, a tensor in it is not used, or one is missing.
    """
    with SafetensorsFolder(hf_path) as folder:
        _stored_tensors(folder, architecture, layout)


def load_hf_weights(
    model: R1V2Model,
    hf_path: Path | str,
    context: ParallelContext,
    *,
    layout: Layout = "transformers",
    cast: bool = False,
) -> None:
    """Fill this rank's parameters from a Hugging Face folder; no communication.

    Args:
        model: unwrapped (no DDP around it).
        cast: whether the folder's dtype may be rounded to the model's. A wider model dtype is always fine.

    Raises:
        ValueError: the folder cannot be read, a tensor in it is not used, one is missing, or shape or dtype differ.
    """
    local = global_parameters(model)
    unfilled = sorted(set(local) - {mapped.ours for mapped in parameter_map(model.architecture, layout)})
    if unfilled:
        raise ValueError(f"no row of checkpoint/hf/mapping.py fills {', '.join(unfilled[:8])}")
    with SafetensorsFolder(hf_path) as folder:
        stored = _stored_tensors(folder, model.architecture, layout)
        if model.architecture.language.tied_embeddings and not are_tied(folder, stored):
            raise ValueError(
                f"{folder.folder}: {stored[HF_OUTPUT]} differs from {stored[HF_EMBEDDING]}, and the model has one "
                "matrix for both; build it from this folder's config.json, or set tie_word_embeddings to false there"
            )
        for mapped in parameter_map(model.architecture, layout):
            # It belongs to another pipeline stage.
            if mapped.ours not in local:
                continue
            tensors = {name: folder.tensor(stored[name]) for name in mapped.hf}
            shard = mapped.to_shard(tensors, tensor_rank=context.tensor_rank, tensor_size=context.tensor_size)
            _fill(local[mapped.ours], shard, mapped, cast=cast)


def fill_whole(model: R1V2Model, read: Callable[[str], torch.Tensor]) -> None:
    """Fill a model that is on one rank alone.

    Args:
        read: returns a whole parameter by our name.
    """
    with torch.no_grad():
        for name, parameter in global_parameters(model).items():
            parameter.copy_(read(name))


def global_parameters(model: R1V2Model) -> dict[str, torch.nn.Parameter]:
    """Return the parameters on this rank that Hugging Face knows, layers numbered over the whole model."""
    # The names count from 0 on each pipeline stage, layer_number over the whole model.
    numbers = {
        name: module.layer_number - 1 for name, module in model.named_modules() if isinstance(module, TransformerLayer)
    }
    found = {}
    for name, parameter in model.named_parameters():
        if name == SCORE_HEAD:
            continue
        match = re.match(r"(.*\.layers)\.\d+(?=\.)", name)
        if match:
            name = f"{match[1]}.{numbers[match[0]]}.{_local_name(name[match.end() + 1 :])}"
        found[name] = parameter
    return found


def _local_name(name: str) -> str:
    """Return the name that a parameter of a layer has in the local implementation: the table knows only those."""
    for local, fused in FUSED_NORM_NAMES.items():
        if name.startswith(fused):
            return local + name.removeprefix(fused)
    return name


def _stored_tensors(folder: SafetensorsFolder, architecture: R1V2Architecture, layout: Layout) -> dict[str, str]:
    """Return `stored_names` of a folder, where it holds all tensors of the model and no other."""
    check_tensors(folder.dtypes(), folder.folder)
    stored = stored_names(folder.names(), layout, tied=architecture.language.tied_embeddings)
    unused, missing = hf_leftovers(architecture, stored, layout)
    problems = [
        f"{count} {what}: {', '.join(names[:8])}{', ...' if count > 8 else ''}"
        for what, names in (
            ("tensors of the folder that the model has no place for", unused),
            ("tensors that the folder lacks", missing),
        )
        if (count := len(names))
    ]
    if problems:
        sentence = f"{folder.folder} does not fit the model: {'; '.join(problems)}; is it the folder of another model?"
        raise ValueError(sentence) if missing else Unsupported("superfluous tensors", sentence)
    return stored


def _fill(parameter: torch.nn.Parameter, shard: torch.Tensor, mapped: MappedParameter, *, cast: bool) -> None:
    if shard.shape != parameter.shape:
        raise ValueError(
            f"{' + '.join(mapped.hf)} give {list(shard.shape)} on this rank but {mapped.ours} is "
            f"{list(parameter.shape)}; the weights do not belong to this config.json"
        )
    if torch.promote_types(shard.dtype, parameter.dtype) != parameter.dtype and not cast:
        raise ValueError(
            f"{' + '.join(mapped.hf)} are {shard.dtype} but the model computes in {parameter.dtype}, which would round "
            "them; set model.precision to the folder's, or allow the rounding (cast)"
        )
    with torch.no_grad():
        parameter.copy_(shard)
