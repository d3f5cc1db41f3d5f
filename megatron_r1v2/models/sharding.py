"""How padded tensors are described to `dist_checkpointing`."""

from __future__ import annotations

from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor


def allow_padding(sharded: ShardedStateDict) -> ShardedStateDict:
    """Let tensors whose size depends on the layout (zero heads at the end) load into another layout.

    Args:
        sharded: the state of one module; changed in place.

    Returns:
        The same dictionary.
    """
    for value in sharded.values():
        if isinstance(value, ShardedTensor):
            value.allow_shape_mismatch = True
    return sharded
