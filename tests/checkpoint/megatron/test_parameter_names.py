"""Our names in megatron-core's torch_dist checkpoints; against the model itself in ../test_destinations.py."""

from __future__ import annotations

import pytest

from megatron_r1v2.checkpoint.hf.config import read_hf_architecture
from megatron_r1v2.checkpoint.megatron.parameter_names import DistEntry, dist_entry


@pytest.fixture(scope="module")
def architecture(made):
    return read_hf_architecture(made / "hf")[0]


@pytest.mark.parametrize(
    ("ours", "entry"),
    [
        ("adapter.linear_fc1.weight", DistEntry("adapter.linear_fc1.weight")),
        ("vision.class_token", DistEntry("vision.class_token")),
        ("vision.decoder.layers.1.mlp_scale", DistEntry("vision.decoder.layers.mlp_scale", 1, 2)),
        (
            "vision.decoder.layers.0.input_layernorm.weight",
            DistEntry("vision.decoder.layers.input_layernorm.weight", 0, 2),
        ),
        # The language model's norms have the names of the fused layers that TransformerEngine has.
        (
            "language.decoder.layers.1.input_layernorm.weight",
            DistEntry("language.decoder.layers.self_attention.linear_qkv.layer_norm_weight", 1, 2),
        ),
        ("language.decoder.final_layernorm.weight", DistEntry("language.decoder.final_layernorm.weight")),
    ],
)
def test_layers_are_stacked_and_everything_else_is_an_array_of_its_own(architecture, ours, entry):
    assert dist_entry(ours, architecture) == entry
