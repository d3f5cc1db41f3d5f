"""Weights between a Hugging Face folder and a model that is spread over tensor- and pipeline-parallel ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_r1v2.checkpoint.hf.config import are_tied
from megatron_r1v2.checkpoint.hf.folders import SafetensorsFolder, check_output, read_json, write_hf_folder
from megatron_r1v2.checkpoint.hf.mapping import (
    HF_EMBEDDING,
    HF_OUTPUT,
    OUTPUT_LAYER,
    SCORE_HEAD,
    Layout,
    MappedParameter,
    hf_leftovers,
    parameter_map,
    stored_names,
)
from megatron_r1v2.checkpoint.hf.refusals import check_tensor_names
from megatron_r1v2.models.architecture import FUSED_NORM_NAMES
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel.groups import ParallelContext


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
    local = _by_global_name(model)
    with SafetensorsFolder(hf_path) as folder:
        check_tensor_names(folder.names(), hf_path)
        stored = stored_names(folder.names(), layout, tied=model.architecture.language.tied_embeddings)
        _check_names(model, set(stored), local, hf_path, layout)
        if model.architecture.language.tied_embeddings and not are_tied(folder, stored):
            raise ValueError(
                f"{folder.folder}: {stored[HF_OUTPUT]} differs from {stored[HF_EMBEDDING]}, and the model has one "
                "matrix for both; build it from this folder's config.json, or set tie_word_embeddings to false there"
            )
        for mapped in parameter_map(model.architecture, layout):
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
        for name, parameter in _by_global_name(model).items():
            parameter.copy_(read(name))


def export_hf_weights(model: R1V2Model, context: ParallelContext) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield every Hugging Face tensor of the model, one parameter at a time; a score head has none.

    All ranks must run through it in step: shards travel to the first stage, then to its first rank.

    Yields:
        Name and whole tensor; the tensor is None anywhere but on the main rank.

    Raises:
        ValueError: the language model's weights are kept in 8 bits, so they are not those that were loaded.
    """
    if model.config.fp8_param:
        raise ValueError(
            "model.fp8_weights=true keeps the language model's weights rounded to 8 bits, which would be written; "
            "export with model.fp8_weights=false"
        )
    local = _by_global_name(model)
    owners = _owners(local, context)
    for mapped in parameter_map(model.architecture):
        if not mapped.exported or (model.is_reward_model and mapped.ours == OUTPUT_LAYER):
            continue
        tensors: dict[str, torch.Tensor] = {}
        if context.data_rank == 0:
            shard = _bring_to_first_stage(mapped.ours, local, owners, context)
            shards = _gather_shards(shard, context) if shard is not None else None
            tensors = mapped.to_hf(shards) if shards is not None else {}
        for name in mapped.hf:
            yield name, tensors.get(name)


def save_hf(
    model: R1V2Model, output: Path | str, *, base: Path | str, context: ParallelContext, overwrite: bool = False
) -> None:
    """Write the model as a Hugging Face folder; all ranks call it, the main rank writes.

    Args:
        base: the folder the model was first read from, for config.json, tokenizer and processor.

    Raises:
        ValueError: on every rank, when `output` is refused (see `check_output`).
    """
    refusal: list[str | None] = [None]
    if context.is_main:
        try:
            check_output(output, sources=[base], overwrite=overwrite)
            read_json(Path(base) / "config.json")
        except ValueError as error:
            refusal = [str(error)]
    # Told to all before the export starts: a rank that left alone would let the others wait for it.
    dist.broadcast_object_list(refusal, src=0, device=context.device)
    if refusal[0] is not None:
        raise ValueError(refusal[0])
    with torch.no_grad():
        exported = export_hf_weights(model, context)
        if context.is_main:
            tensors = ((name, tensor) for name, tensor in exported if tensor is not None)
            write_hf_folder(output, base=base, tensors=tensors, overwrite=overwrite)
        else:
            for _ in exported:
                pass
    dist.barrier()


def _by_global_name(model: R1V2Model) -> dict[str, torch.nn.Parameter]:
    """Return the parameters on this rank that Hugging Face knows, layers numbered over the whole model."""
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


def _check_names(
    model: R1V2Model, stored: set[str], local: dict[str, torch.nn.Parameter], hf_path: Path | str, layout: Layout
) -> None:
    unused, missing = hf_leftovers(model.architecture, stored, layout)
    unfilled = sorted(set(local) - {mapped.ours for mapped in parameter_map(model.architecture, layout)})
    problems = [
        f"{count} {what}: {', '.join(names[:8])}{', ...' if count > 8 else ''}"
        for what, names in (
            ("tensors of the folder that the model has no place for", unused),
            ("tensors that the folder lacks", missing),
            ("parameters that no row of checkpoint/hf/mapping.py fills", unfilled),
        )
        if (count := len(names))
    ]
    if problems:
        raise ValueError(f"{hf_path} does not fit the model: {'; '.join(problems)}; is it the folder of another model?")


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


def _owners(
    local: dict[str, torch.nn.Parameter], context: ParallelContext
) -> dict[str, tuple[int, torch.Size, torch.dtype]]:
    """Return stage, shape and dtype of every parameter; the first stage that has it, when several do."""
    mine = {name: (context.pipeline_rank, parameter.shape, parameter.dtype) for name, parameter in local.items()}
    if context.pipeline_size == 1:
        return mine
    stages: list[dict[str, tuple[int, torch.Size, torch.dtype]]] = [{} for _ in range(context.pipeline_size)]
    dist.all_gather_object(stages, mine, group=context.groups.pp)
    owners: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
    for stage in reversed(stages):
        owners.update(stage)
    return owners


def _bring_to_first_stage(
    name: str,
    local: dict[str, torch.nn.Parameter],
    owners: dict[str, tuple[int, torch.Size, torch.dtype]],
    context: ParallelContext,
) -> torch.Tensor | None:
    """Return this tensor-parallel rank's shard on the first stage; the stage that has it sends it there."""
    owner, shape, dtype = owners[name]
    if owner == context.pipeline_rank and context.is_first_stage:
        return local[name].detach()
    ranks = dist.get_process_group_ranks(context.groups.pp)
    if owner == context.pipeline_rank:
        dist.send(local[name].detach().contiguous(), dst=ranks[0], group=context.groups.pp)
    elif context.is_first_stage:
        shard = torch.empty(shape, dtype=dtype, device=context.device)
        dist.recv(shard, src=ranks[owner], group=context.groups.pp)
        return shard
    return None


def _gather_shards(shard: torch.Tensor, context: ParallelContext) -> list[torch.Tensor] | None:
    """Return the shards of all tensor-parallel ranks on the first of them, None on the others."""
    if context.tensor_size == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(context.tensor_size)] if context.tensor_rank == 0 else None
    first = dist.get_process_group_ranks(context.groups.tp)[0]
    dist.gather(shard.contiguous(), shards, dst=first, group=context.groups.tp)
    return shards
