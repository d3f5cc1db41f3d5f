"""Rotations of every published kind: the frequencies of transformers, the scale of yarn by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_r1v2.models.rotary import StretchedRotaryEmbedding, rotary_frequencies, softmax_scale
from tests.models.test_architecture import SKYWORK_R1V2

PLAIN = replace(
    SKYWORK_R1V2.language, hidden_size=64, num_heads=4, num_kv_heads=2, head_size=16, max_positions=512, rope_theta=1e4
)
KINDS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def stretched(kind: str):
    return replace(PLAIN, rope_type=kind, rope_parameters=tuple(KINDS[kind].items()))


def of_transformers(kind: str) -> LlamaRotaryEmbedding:
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        max_position_embeddings=512,
        rope_parameters={"rope_type": kind, "rope_theta": 1e4, **KINDS.get(kind, {})},
    )
    return LlamaRotaryEmbedding(config)


def test_plain_frequencies_are_powers_of_the_base():
    frequencies, factor = rotary_frequencies(PLAIN)
    expected = [10000 ** (-2 * pair / 16) for pair in range(8)]
    torch.testing.assert_close(frequencies, torch.tensor(expected))
    assert factor == 1.0
    assert softmax_scale(PLAIN) is None


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_those_of_transformers(kind):
    theirs = of_transformers(kind)
    frequencies, factor = rotary_frequencies(stretched(kind))
    assert torch.equal(frequencies, theirs.inv_freq)
    assert factor == theirs.attention_scaling


def test_linear_stretching_slows_every_rotation_alike():
    torch.testing.assert_close(rotary_frequencies(stretched("linear"))[0] * 4, rotary_frequencies(PLAIN)[0])


def test_llama_3_leaves_fast_rotations_and_slows_the_slow_ones():
    ratio = rotary_frequencies(stretched("llama3"))[0] / rotary_frequencies(PLAIN)[0]
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(1 / 8)


def test_yarn_scales_the_scores_by_the_square_of_its_factor():
    """m = 0.1 ln(factor) + 1; queries and keys carry it both."""
    expected = (0.1 * math.log(4.0) + 1) ** 2 / math.sqrt(16)
    assert softmax_scale(stretched("yarn")) == pytest.approx(expected, rel=1e-6)
    assert softmax_scale(stretched("linear")) is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_embedding_turns_by_the_stretched_angles(kind, context):
    plain = RotaryEmbedding(16, 1.0, rotary_base=1e4, use_cpu_initialization=True, cp_group=context.groups.cp)
    angles = StretchedRotaryEmbedding(stretched(kind), plain)(40)[:, 0, 0]
    positions = torch.arange(40)[None]
    theirs = of_transformers(kind)
    cosines, sines = theirs(torch.zeros(1), positions)
    torch.testing.assert_close(angles.cos() * theirs.attention_scaling, cosines[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(angles.sin() * theirs.attention_scaling, sines[0], atol=1e-5, rtol=0)
