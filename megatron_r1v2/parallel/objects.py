"""Python objects between processes: what is small, or differs in size from rank to rank."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")


def all_gather(item: Item, group: dist.ProcessGroup | None = None) -> list[Item]:
    """Return the item of every rank of the group (None: of all ranks), in rank order."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, item, group=group)
    return gathered


def broadcast_from_first(item: Item | None, group: dist.ProcessGroup) -> Item:
    """Return the item of the group's first rank on all of its ranks; the others pass None."""
    box = [item]
    dist.broadcast_object_list(box, src=dist.get_process_group_ranks(group)[0], group=group)
    return box[0]  # type: ignore[return-value]


def exchange(outgoing: Sequence[Item], group: dist.ProcessGroup, device: torch.device) -> list[Item]:
    """Send a different item to every rank of the group.

    Args:
        outgoing: item i goes to rank i of the group.
        group: the ranks.
        device: where the backend wants its tensors.

    Returns:
        Item i came from rank i.
    """
    if group.size() == 1:
        return list(outgoing)
    packed = [torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8) for item in outgoing]
    sizes_out = torch.tensor([len(data) for data in packed], dtype=torch.int64, device=device)
    sizes_in = torch.zeros_like(sizes_out)
    dist.all_to_all_single(sizes_in, sizes_out, group=group)
    received = torch.empty(int(sizes_in.sum()), dtype=torch.uint8, device=device)
    splits_in, splits_out = sizes_in.tolist(), sizes_out.tolist()
    dist.all_to_all_single(received, torch.cat(packed).to(device), splits_in, splits_out, group=group)
    return [pickle.load(io.BytesIO(part.cpu().numpy().tobytes())) for part in received.split(splits_in)]
