"""The calls that read from the device, for which the host waits on a GPU; on a CPU they are the same ones."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

READS = {
    torch.Tensor.tolist,
    torch.Tensor.item,
    torch.Tensor.cpu,
    torch.Tensor.numpy,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__index__,
    torch.Tensor.__float__,
    torch.Tensor.nonzero,
    torch.nonzero,
}


class CountReads(TorchFunctionMode):
    """A count of the reads by the file and function of their caller."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: Counter[tuple[str, str]] = Counter()
        self.theirs: Counter[tuple[str, str]] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READS:
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            path = Path(frame.f_code.co_filename)
            owner = self.ours if "megatron_r1v2" in path.parts else self.theirs
            owner[path.name, frame.f_code.co_name] += 1
        return func(*args, **(kwargs or {}))
