"""The checksum that is the same for every sharding of a tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.checkpoint.megatron import tensor_checksum as module
from megatron_r1v2.checkpoint.megatron.tensor_checksum import MODULUS, tensor_checksum

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8]


def checksum(tensor: torch.Tensor, name: str = "a") -> int:
    return int(tensor_checksum(tensor, name)) % MODULUS


def numbers(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(12, 8, generator=torch.Generator().manual_seed(seed)) * 50).to(dtype)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), dim=st.integers(0, 1), cut=st.integers(1, 7), dtype=st.sampled_from(DTYPES))
def test_shards_add_up_to_the_whole_and_padding_counts_nothing(seed, dim, cut, dtype):
    whole = numbers(seed, dtype)
    one, two = whole.tensor_split([cut], dim=dim)
    padded = torch.cat([two, torch.zeros_like(two)], dim=dim)
    assert (checksum(one) + checksum(padded)) % MODULUS == checksum(whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_and_the_name_count(dtype):
    tensor = numbers(0, dtype)
    width = 8 * tensor.element_size()
    integers = tensor.view({8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[width])
    before = checksum(tensor)
    for bit in range(width - 1):
        integers[3, 5] ^= 1 << bit
        assert checksum(tensor) != before, bit
        integers[3, 5] ^= 1 << bit
    assert checksum(tensor) == before
    assert checksum(tensor, "b") != before


def test_large_tensors_are_summed_in_pieces(monkeypatch):
    tensor = numbers(1)
    before = checksum(tensor)
    monkeypatch.setattr(module, "_AT_ONCE_ON_CPU", 7)
    assert checksum(tensor) == before
