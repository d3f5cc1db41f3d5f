"""The layout of TransformerEngine's FusedAdam in torch: no state before the first step, one step count a group.

A machine without CUDA cannot import the original, and megatron-core saves and loads its state in another way than that
of torch's Adam.
"""

from __future__ import annotations

import megatron.core.optimizer as optimizers
import pytest
import torch
from megatron.core.optimizer import distrib_optimizer


class FusedAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay, of fp32 states."""

    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode):
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
                if parameter.grad is None:
                    continue
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                root = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(state["exp_avg"] / (1 - beta1 ** group["step"]), root, value=-group["lr"])


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let megatron-core believe that it has found TransformerEngine's optimizer."""
    monkeypatch.setattr(optimizers, "Adam", FusedAdam)
    monkeypatch.setattr(optimizers, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(distrib_optimizer, "Adam", FusedAdam)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
