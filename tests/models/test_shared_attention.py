"""Attention in shared rows against a mask written out, and against separate rows, gradients included."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_r1v2.models import shared_attention as module
from megatron_r1v2.models.shared_attention import (
    SharedGroup,
    SharedRowAttention,
    SharedRowParams,
    check_shared_attention,
    shared_attention,
)

CPU = torch.device("cpu")


def layout(lengths: list[tuple[int, list[int]]]) -> tuple[SharedGroup, ...]:
    """Lay (prompt, responses) out one after the other."""
    groups, start = [], 0
    for prompt, responses in lengths:
        ends = tuple(itertools.accumulate(responses, initial=start + prompt))[1:]
        groups.append(SharedGroup(start, start + prompt, ends))
        start = ends[-1] if ends else start + prompt
    return tuple(groups)


def mask_of(lengths: list[tuple[int, list[int]]]) -> torch.Tensor:
    """Write out who sees whom, token by token."""
    owner = [  # (group, 0 for the prompt or the number of the response)
        (group, part)
        for group, (prompt, responses) in enumerate(lengths)
        for part, length in enumerate([prompt, *responses])
        for _ in range(length)
    ]
    size = len(owner)
    mask = torch.zeros(size, size, dtype=torch.bool)
    for row, column in itertools.product(range(size), repeat=2):
        same_group = owner[row][0] == owner[column][0]
        mask[row, column] = same_group and column <= row and owner[column][1] in (0, owner[row][1])
    return mask


def random_inputs(size: int, *, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, count, size, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]


def with_gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [output, *torch.autograd.grad((output * weight.to(output.dtype)).sum(), inputs)]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 9), st.lists(st.integers(1, 9), max_size=4)).filter(
            lambda item: item[0] + len(item[1])
        ),
        min_size=1,
        max_size=4,
    ),
    kv_heads=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([None, 0.2]),
    seed=st.integers(0, 99),
)
def test_shared_rows_equal_a_mask_written_out(lengths, kv_heads, scale, seed):
    groups, mask = layout(lengths), mask_of(lengths)
    inputs = random_inputs(len(mask), kv_heads=kv_heads, seed=seed)
    ours = with_gradients(shared_attention(*inputs, groups, scale=scale), inputs)
    query, key, value = inputs
    key, value = (tensor.repeat_interleave(4 // kv_heads, dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(2, 3)) * (8**-0.5 if scale is None else scale)
    theirs = with_gradients(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value, inputs)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_three_tokens_by_hand():
    # Prompt [0], responses [1] and [2]: each sees the prompt and itself. Scores are 0, so weights are a half each.
    query = torch.zeros(1, 1, 3, 8)
    value = torch.tensor([1.0, 3.0, 7.0]).view(1, 1, 3, 1).expand(1, 1, 3, 8)
    output = shared_attention(query, query, value, [SharedGroup(0, 1, (2, 3))])
    assert output[0, 0, :, 0].tolist() == pytest.approx([1.0, 2.0, 4.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_is_that_of_separate_rows(dtype):
    lengths = [(21, [9, 1, 14])]
    inputs = random_inputs(45, dtype=dtype)
    groups = layout(lengths)
    ours = with_gradients(shared_attention(*inputs, groups), inputs)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = with_gradients(shared_attention(*wide, groups), wide)
    for got, expected in zip(ours, exact, strict=True):
        assert got.dtype == dtype
        difference = float((got.double() - expected).abs().max() / expected.abs().max())
        assert difference < (1e-6 if dtype is torch.float32 else 2e-2)


def test_a_prompt_of_one_token_leaves_no_prompt_part():
    # [last prompt token + response] twice, with nothing before: two sequences by themselves.
    inputs = random_inputs(7)
    output = shared_attention(*inputs, [SharedGroup(0, 0, (3, 7))])
    for part in (slice(0, 3), slice(3, 7)):
        alone = F.scaled_dot_product_attention(*(t[:, :, part] for t in inputs), is_causal=True, enable_gqa=True)
        torch.testing.assert_close(output[:, :, part], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_of_cuda_take_these_arguments(dtype):
    # Shapes only: meta tensors hold nothing. The numbers are checked on the device, at set-up.
    query, key, value = (torch.empty(1, heads, 45, 8, dtype=dtype, device="meta") for heads in (4, 2, 2))
    inputs = (query[:, :, 21:], key[:, :, :21], value[:, :, :21])
    output, lse = module._attend(*inputs, causal=False, scale=None)
    grads = module._attend_backward(output, inputs, output, lse, causal=False, scale=None)
    assert (output.shape, output.dtype) == ((1, 4, 24, 8), dtype)
    assert (lse.shape, lse.dtype) == ((1, 4, 24), torch.float32)
    assert [(grad.shape, grad.dtype) for grad in grads] == [(tensor.shape, dtype) for tensor in inputs]


class Other(nn.Module):
    """A core attention that only says that it was asked."""

    def __init__(self, softmax_scale: float | None = None) -> None:
        super().__init__()
        self.config = TransformerConfig(
            num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, softmax_scale=softmax_scale
        )

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, packed_seq_params=None):
        return ("asked", attn_mask_type, packed_seq_params)


class Mixed(SharedRowAttention, Other):
    """Shared rows before it."""


@pytest.mark.parametrize("scale", [None, 0.2])
def test_only_shared_rows_leave_the_core_attention(scale):
    core = Mixed(scale)
    inputs = random_inputs(9)
    sbhd = [tensor.permute(2, 0, 1, 3) for tensor in inputs]
    plain = PackedSeqParams(qkv_format="thd")
    assert core(*sbhd, None, attn_mask_type="causal", packed_seq_params=plain) == ("asked", "causal", plain)
    groups = layout([(4, [2, 3])])
    output = core(*sbhd, None, packed_seq_params=SharedRowParams(qkv_format="sbhd", groups=groups))
    expected = shared_attention(*inputs, groups, scale=scale)
    assert output.shape == (9, 1, 32)
    assert torch.equal(output.view(9, 1, 4, 8).permute(1, 2, 0, 3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_at_set_up_passes_here(dtype):
    check_shared_attention(heads=4, kv_heads=2, head_size=16, device=CPU, dtype=dtype)


@pytest.mark.parametrize("broken", ["_attend", "_attend_backward"])
def test_the_check_at_set_up_finds_a_wrong_kernel(monkeypatch, broken):
    right = getattr(module, broken)

    def wrong(*args, causal, **kwargs):
        # As if the kernel took a response's view of its prompt for a causal one.
        return right(*args, causal=True, **kwargs)

    monkeypatch.setattr(module, broken, wrong)
    with pytest.raises(RuntimeError, match="attention in shared rows differs from separate rows on cpu"):
        check_shared_attention(heads=4, kv_heads=2, head_size=16, device=CPU, dtype=torch.float32)
