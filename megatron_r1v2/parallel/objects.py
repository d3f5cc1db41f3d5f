"""Collectives of Python objects, for data that is small or differs in size between ranks."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")


def all_gather(item: Item, group: dist.ProcessGroup | None = None) -> list[Item]:
    """Collective over `group` (None: all ranks): return the item of every rank, in rank order."""
    gathered: list[Item] = [item] * dist.get_world_size(group)
    dist.all_gather_object(gathered, item, group=group)
    return gathered


def broadcast_from_first(item: Item | None, group: dist.ProcessGroup) -> Item:
    """Collective over `group`: return the item of its first rank on all of its ranks; the others pass None."""
    items: list[Item | None] = [item]
    dist.broadcast_object_list(items, src=dist.get_process_group_ranks(group)[0], group=group)
    return items[0]  # type: ignore[return-value]  # not None any more: the first rank's item replaced it


def exchange(outgoing: Sequence[Item], group: dist.ProcessGroup, device: torch.device) -> list[Item]:
    """Collective over `group`: send item i of `outgoing` to rank i, and return the items of all ranks in rank order.

    Args:
        device: the device that the group's backend sends from.
    """
    if group.size() == 1:
        return list(outgoing)
    # Pickled by hand: torch has no all-to-all of objects, and gathering them would send every item to every rank.
    packed = [torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8) for item in outgoing]
    sizes_out = torch.tensor([len(data) for data in packed], dtype=torch.int64, device=device)
    sizes_in = torch.zeros_like(sizes_out)
    # Receivers must know the sizes first, since they allocate the buffer.
    dist.all_to_all_single(sizes_in, sizes_out, group=group)
    received = torch.empty(int(sizes_in.sum()), dtype=torch.uint8, device=device)
    splits_in, splits_out = sizes_in.tolist(), sizes_out.tolist()
    dist.all_to_all_single(received, torch.cat(packed).to(device), splits_in, splits_out, group=group)
    return [pickle.load(io.BytesIO(part.cpu().numpy().tobytes())) for part in torch.split(received, splits_in)]
