"""The attention kernel is chosen: flash where it takes the numbers, else the memory-efficient one; never another."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.nn import attention
from torch.nn.attention import SDPBackend

from megatron_r1v2.models import sdpa
from megatron_r1v2.models.sdpa import attend, choose_kernel, repeat_heads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("has_mask", [False, True])
def test_flash_has_neither_float32_nor_masks(dtype, has_mask):
    is_flash = dtype is not torch.float32 and not has_mask
    expected = SDPBackend.FLASH_ATTENTION if is_flash else SDPBackend.EFFICIENT_ATTENTION
    assert choose_kernel(dtype, has_mask=has_mask) is expected


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def inputs(dtype=torch.float32, kv_heads=2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(2, heads, 5, 8, generator=generator).to(dtype) for heads in (4, kv_heads, kv_heads))


@pytest.fixture
def chosen(monkeypatch) -> list[object]:
    """Record the kernels that are chosen, and let the CPU compute."""
    chosen: list[object] = []

    @contextmanager
    def choose(kernel):
        chosen.append(kernel)
        yield

    monkeypatch.setattr(attention, "sdpa_kernel", choose)
    return chosen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_mask", [False, True])
def test_the_chosen_kernel_gets_all_arguments(chosen, dtype, has_mask):
    query, key, value = inputs(dtype)
    mask = torch.ones(5, 5, dtype=torch.bool).tril() if has_mask else None
    how = {"scale": 0.3, "is_causal": not has_mask, "mask": mask}
    here = attend(query, key, value, **how)
    assert chosen == []
    there = attend(*(tensor.as_subclass(OnGpu) for tensor in (query, key, value)), **how)
    torch.testing.assert_close(there.as_subclass(torch.Tensor), here)
    assert chosen == [choose_kernel(dtype, has_mask=has_mask)]


def test_causal_and_masked_attention_are_the_same():
    query, key, value = inputs()
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    causal = attend(query, key, value, scale=None, is_causal=True)
    torch.testing.assert_close(attend(query, key, value, scale=None, mask=mask), causal)
    alone = attend(query, repeat_heads(key, 4), repeat_heads(value, 4), scale=None, is_causal=True)
    torch.testing.assert_close(alone, causal)


@pytest.mark.parametrize(("words", "error"), [("No available kernel. Aborting.", ValueError), ("no", RuntimeError)])
def test_a_shape_that_no_kernel_takes_is_named(chosen, monkeypatch, words, error):
    def refuse(*_, **__):
        raise RuntimeError(words)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a Volta")
    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", refuse)
    query, key, value = (tensor.as_subclass(OnGpu) for tensor in inputs(torch.bfloat16))
    with pytest.raises(error) as refused:
        attend(query, key, value, scale=None)
    if error is ValueError:
        assert "FLASH_ATTENTION" in str(refused.value)
        assert "a Volta" in str(refused.value)
        assert "[2, 4, 5, 8]" in str(refused.value)
