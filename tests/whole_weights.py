"""The weights of a model that is spread over ranks, brought together or saved without an optimizer, for comparisons."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_r1v2.checkpoint.hf.mapping import parameter_map
from megatron_r1v2.checkpoint.hf.weights import global_parameters
from megatron_r1v2.checkpoint.megatron.run_folder import TENSORS, save_state
from megatron_r1v2.config.choices import Part
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.training.part_state import part_names, part_state

OUTPUT_LAYER = "language.output_layer.weight"


def gather_hf_weights(model: R1V2Model, context: ParallelContext) -> dict[str, torch.Tensor]:
    """Collective over the world: return all weights by their Hugging Face names on the main rank, {} elsewhere."""
    held = {name: value.detach().cpu() for name, value in global_parameters(model).items()}
    ranks: list[tuple[int, int, dict[str, torch.Tensor]]] = [(0, 0, {})] * dist.get_world_size()
    dist.all_gather_object(ranks, (context.data_rank, context.tensor_rank, held))
    if not context.is_main:
        return {}
    # The last stage's copy of a tied embedding is not exported; of other copies any will do.
    shards: dict[str, dict[int, torch.Tensor]] = {}
    for data_rank, tensor_rank, values in ranks:
        for name, value in values.items() if data_rank == 0 else ():
            shards.setdefault(name, {}).setdefault(tensor_rank, value)
    whole: dict[str, torch.Tensor] = {}
    for mapped in parameter_map(model.architecture):
        if mapped.exported and not (model.is_reward_model and mapped.ours == OUTPUT_LAYER):
            whole |= mapped.to_hf([shards[mapped.ours][rank] for rank in range(context.tensor_size)])
    return whole


def save_weights(model: R1V2Model, folder: Path, context: ParallelContext, *, parts: Iterable[Part]) -> None:
    """Collective over the world: save parts of a model as a run saves them, without its optimizer."""
    if context.is_main:
        (folder / TENSORS).mkdir(parents=True)
        names = part_names(set(parts) & set(model.parts))
        save_state(folder, {"step": 0, "version": 0, "parts": names, "trained": []})
    dist.barrier()
    dist_checkpointing.save({"model": part_state(model, parts)}, str(folder / TENSORS))
    dist.barrier()
