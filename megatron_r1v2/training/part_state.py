"""Parts of the model as state for `dist_checkpointing`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor

from megatron_r1v2.checkpoint.megatron.run_folder import TENSORS
from megatron_r1v2.config.choices import Part
from megatron_r1v2.models.r1v2 import R1V2Model


def part_state(model: R1V2Model, parts: Iterable[Part]) -> ShardedStateDict:
    """Describe the parameters of some parts of the model to `dist_checkpointing`."""
    names = part_names(parts)
    sharded = model.sharded_state_dict()
    # TransformerEngine's extra states hold scales that tensorwise and blockwise recipes compute anew for every product.
    return {
        key: value
        for key, value in sharded.items()
        if key.split(".", 1)[0] in names and not key.endswith("_extra_state")
    }


def part_names(parts: Iterable[Part]) -> list[str]:
    """Return the names of distinct parts, sorted."""
    return sorted({Part(part).value for part in parts})


def fill(model: R1V2Model, loaded: Mapping[str, Any], folder: Path) -> None:
    """Put loaded parts into the model.

    Raises:
        ValueError: they are not those of the model.
    """
    # Not strict: the parts that no stage has trained are those of the HF model, and not in the checkpoint.
    result = model.load_state_dict(dict(loaded), strict=False)
    wanted = {key.split(".", 1)[0] for key in loaded}
    missing = [
        key for key in result.missing_keys if key.split(".", 1)[0] in wanted and not key.endswith("_extra_state")
    ]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"checkpoint {folder} does not fit the model: missing {missing[:5]}, unexpected "
            f"{result.unexpected_keys[:5]}; model.hf_path must be the model that it was made from"
        )


def check_shapes(sharded: ShardedStateDict, folder: Path) -> None:
    """Refuse a checkpoint of a model of other sizes before megatron-core does, in words."""
    saved = dist_checkpointing.load_tensors_metadata(str(folder / TENSORS))
    for wanted in sharded.values():
        if not isinstance(wanted, ShardedTensor):
            continue
        if wanted.key not in saved:
            message = f"{wanted.key} is not in it"
        elif tuple(saved[wanted.key].global_shape) != tuple(wanted.global_shape) and not wanted.allow_shape_mismatch:
            message = (
                f"{wanted.key} is {list(saved[wanted.key].global_shape)} in it and {list(wanted.global_shape)} in "
            )
            message += "the model"
        else:
            continue
        raise ValueError(
            f"checkpoint {folder} does not fit the model: {message}; model.hf_path must be the model that it was made "
            "from"
        )
