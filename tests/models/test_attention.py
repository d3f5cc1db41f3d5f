"""Attention against softmax written out, and packed rows against separate ones."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1v2.models.attention import SDPACoreAttention
from megatron_r1v2.models.shared_attention import PackedRowParams

HEADS, SIZE = 4, 8


def attention(mask_type: AttnMaskType) -> SDPACoreAttention:
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * SIZE, num_attention_heads=HEADS)
    return SDPACoreAttention(config, 1, mask_type, "self")


def written_out(query_SND, key_SND, value_SND, causal: bool) -> torch.Tensor:
    """Attend in one sequence: softmax(q k / sqrt(D)) v, head by head."""
    length, heads, size = query_SND.shape
    out = torch.zeros_like(query_SND)
    for head in range(heads):
        shared = head * key_SND.shape[1] // heads
        scores = query_SND[:, head] @ key_SND[:, shared].T / size**0.5
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        out[:, head] = scores.softmax(-1) @ value_SND[:, shared]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask_type", [AttnMaskType.causal, AttnMaskType.no_mask])
def test_rows_equal_softmax_written_out(kv_heads, mask_type):
    query = torch.randn(7, 3, HEADS, SIZE)
    key, value = torch.randn(2, 7, 3, kv_heads, SIZE)
    got = attention(mask_type)(query, key, value, None)
    causal = mask_type is AttnMaskType.causal
    for row in range(3):
        expected = written_out(query[:, row], key[:, row], value[:, row], causal)
        torch.testing.assert_close(got[:, row], expected.flatten(1), atol=1e-5, rtol=1e-5)


def test_the_mask_type_of_the_call_wins():
    query, key, value = torch.randn(3, 7, 1, HEADS, SIZE)
    core = attention(AttnMaskType.causal)
    full = core(query, key, value, None, attn_mask_type=AttnMaskType.no_mask)
    assert torch.equal(full, attention(AttnMaskType.no_mask)(query, key, value, None))
    assert not torch.allclose(full, core(query, key, value, None))


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    spare=st.integers(0, 3),
    kv_heads=st.sampled_from([1, 2, 4]),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_packed_sequences_equal_separate_ones(lengths, spare, kv_heads, causal, seed):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths) + spare
    query = torch.randn(total, HEADS, SIZE, generator=generator)
    key, value = torch.randn(2, total, kv_heads, SIZE, generator=generator)
    bounds = tuple(itertools.accumulate(lengths, initial=0))
    packing = PackedRowParams(qkv_format="thd", bounds=bounds)
    core = attention(AttnMaskType.causal if causal else AttnMaskType.no_mask)
    got = core(query, key, value, None, packed_seq_params=packing)
    assert got.shape == query.shape
    for start, end in itertools.pairwise(bounds):
        expected = written_out(query[start:end], key[start:end], value[start:end], causal)
        torch.testing.assert_close(got[start:end], expected, atol=1e-5, rtol=1e-5)
    assert not got[sum(lengths) :].any(), "what follows the last sequence is padding"


def test_masks_and_biases_are_not_silently_dropped():
    query, key, value = torch.randn(3, 7, 1, HEADS, SIZE)
    core = attention(AttnMaskType.causal)
    with pytest.raises(AssertionError, match="mask"):
        core(query, key, value, torch.zeros(1, 1, 7, 7, dtype=torch.bool))
    with pytest.raises(AssertionError, match="bias"):
        core(query, key, value, None, attention_bias=torch.zeros(1, HEADS, 7, 7))
