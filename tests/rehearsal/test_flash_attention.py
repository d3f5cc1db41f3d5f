"""The stand-ins for flash-attn refuse what its kernels refuse."""

from types import SimpleNamespace

import pytest
import torch

from megatron_r1v2.rehearsal.flash_attention import _check


def tensor(*shape, dtype=torch.bfloat16, cuda=True, stride=1):
    """Return what the check reads of a tensor on a GPU."""
    return SimpleNamespace(
        is_cuda=cuda,
        device="cuda:0" if cuda else "cpu",
        dtype=dtype,
        shape=shape,
        stride=lambda _: stride,
    )


SOUND = {
    "q": tensor(4, 8, 128),
    "k": tensor(10, 256, 2, 128),
    "v": tensor(10, 256, 2, 128),
    "table": tensor(3, 5, dtype=torch.int32),
    "lengths": tensor(4, dtype=torch.int32),
}


def test_what_flash_attention_takes_passes():
    _check(**SOUND)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"table": tensor(3, 5, dtype=torch.int32, cuda=False)}, "block_table is on cpu"),
        ({"q": tensor(4, 8, 128, dtype=torch.float32)}, "accepted: bf16 or fp16"),
        ({"lengths": tensor(4, dtype=torch.int64)}, "accepted: int32"),
        ({"k": tensor(10, 64, 2, 128)}, "blocks have 64 tokens; accepted: multiples of 256"),
        ({"q": tensor(4, 7, 128)}, "7 heads of 128 over 2 key heads"),
        ({"v": tensor(10, 256, 2, 128, stride=2)}, "not contiguous"),
    ],
)
def test_what_it_refuses_is_an_error(changed, words):
    with pytest.raises(ValueError, match=words):
        _check(**{**SOUND, **changed})
