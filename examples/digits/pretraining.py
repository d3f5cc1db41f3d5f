"""The optimizers, schedule and progress line of the demo's two pretrained components."""

from __future__ import annotations

import math
import sys
import time

import torch
from torch import nn


def cosine_factor(step: int, total: int, *, warmup: int, floor: float) -> float:
    """Return the learning rate's factor at a step: linear warm-up, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


class Optimizers:
    """Muon for the matrices inside the layers, AdamW for the rest (embeddings, norms, biases, heads).

    Muon needs about half the steps of AdamW here, and the demo has minutes.

    Args:
        model: the model to train.
        muon: peak learning rate of Muon.
        adam: peak learning rate of AdamW.
        steps: length of the schedule.
    """

    def __init__(self, model: nn.Module, *, muon: float, adam: float, steps: int) -> None:
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            # Muon orthogonalises updates, which suits maps between hidden states, but not rows of an embedding.
            (matrices if parameter.ndim == 2 and ".layer" in name else rest).append(parameter)
        self._model, self._steps = model, steps
        self._optimizers = [
            (torch.optim.Muon(matrices, weight_decay=0.01), muon),
            (torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01), adam),
        ]

    def update(self, loss: torch.Tensor, step: int) -> float:
        """Take step `step` (from 0) with gradients clipped to norm 1; return the loss as a number."""
        factor = cosine_factor(step, self._steps, warmup=min(25, self._steps), floor=0.02)
        for optimizer, peak in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for optimizer, _ in self._optimizers:
            optimizer.step()
        return loss.item()


class Progress:
    """A line with the progress of a loop: rewritten on a terminal, every tenth of the way in a log."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total = name, total
        self._start = time.perf_counter()
        self._terminal = sys.stdout.isatty()

    def show(self, step: int, loss: float) -> None:
        """Show step `step` (from 1) and its loss."""
        last = step == self._total
        if not self._terminal and not last and step % max(1, self._total // 10):
            return
        seconds = time.perf_counter() - self._start
        left = seconds / step * (self._total - step)
        line = f"{self._name}: step {step}/{self._total}, loss {loss:.3f}, {seconds:.0f} s, {left:.0f} s left"
        print(f"\r{line:<78}" if self._terminal else line, end="\n" if last or not self._terminal else "", flush=True)
