"""The checksum of one tensor, the same for every sharding; `weight_checksums` sums it over tensors and ranks."""

from __future__ import annotations

import zlib

import torch

MODULUS = 2**63
_FIRST_FACTOR = 0x1B873593CC9E2D51
ELEMENTS_AT_ONCE = 2**24
"""Elements that are mixed at once, in int64, on a GPU."""
_AT_ONCE_ON_CPU = 2**19
"""Fewer, whose intermediate results stay in a cache: ten times as fast."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_checksum(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Compute a sum over the elements, of a number mixed from the bits of each and the name; zeros add nothing.

    Args:
        tensor: any shape; its dtype matters.
        name: megatron-core's, of the array in a checkpoint (`dist_entry`).

    Returns:
        A scalar int64 on the tensor's device, to be summed with those of other tensors and taken modulo 2^63.
    """
    tensor = tensor.detach()
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):  # TransformerEngine's 8-bit weights
        tensor = tensor.float()
    bits = tensor.contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    factor = (zlib.crc32(name.encode()) << 1) | 1
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in torch.split(bits, _AT_ONCE_ON_CPU if bits.device.type == "cpu" else ELEMENTS_AT_ONCE):
        mixed = part.long() * _FIRST_FACTOR
        mixed = (mixed ^ (mixed >> 29)) * factor
        total += (mixed ^ (mixed >> 32)).sum()
    return total
