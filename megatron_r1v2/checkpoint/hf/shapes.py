"""The shape of every parameter of a configuration, from transformers' own classes on the meta device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch

from megatron_r1v2.checkpoint.hf.architecture import Config, r1v2_architecture
from megatron_r1v2.checkpoint.hf.mapping import parameter_map, stored_names


def parameter_shapes(config: Config) -> Mapping[str, torch.Size]:
    """Return the shape of each of our parameters, whole, by our name.

    Args:
        config: as transformers' InternVL has it.
    """
    return _shapes(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=4)
def _shapes(config_json: str) -> Mapping[str, torch.Size]:
    # Importing the model takes a second more than its configuration, which training has no use for.
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = json.loads(config_json)
    with torch.device("meta"):
        tensors = InternVLForConditionalGeneration(InternVLConfig.from_dict(dict(config))).state_dict()
    # The pixel shuffle changes no shape; transformers has the second alone.
    architecture = replace(r1v2_architecture(json.loads(config_json)), pixel_shuffle="v2")
    stored = stored_names(tensors, "transformers", tied=architecture.language.tied_embeddings)
    by_table = {name: tensors[inside] for name, inside in stored.items()}
    return {row.ours: row.to_shard(by_table, tensor_rank=0, tensor_size=1).shape for row in parameter_map(architecture)}
