"""Linears without gradients: megatron-core's bits, and none of its autograd functions."""

import pytest
import torch
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_r1v2.models.linears import ColumnLinear, RowLinear


def linear(kind, context, *, bias: bool, skip_bias_add: bool):
    config = TransformerConfig(num_layers=1, hidden_size=24, num_attention_heads=2)
    sizes = {ColumnLinear: {"gather_output": False}, RowLinear: {"input_is_parallel": True}}[kind]
    shared = {"bias": bias, "skip_bias_add": skip_bias_add, "init_method": config.init_method}
    layer = kind(24, 40, config=config, tp_group=context.groups.tp, **sizes, **shared)
    if bias:
        torch.nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("kind", [ColumnLinear, RowLinear])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(("bias", "skip_bias_add"), [(False, False), (True, False), (True, True)])
def test_bits_are_those_with_gradients(kind, tokens, bias, skip_bias_add, context, monkeypatch):
    layer = linear(kind, context, bias=bias, skip_bias_add=skip_bias_add)
    hidden = torch.randn(tokens, 1, 24)
    expected, bias_left = layer(hidden)
    assert expected.requires_grad

    def refuse(*args, **kwargs):
        raise AssertionError("an autograd function without gradients")

    monkeypatch.setattr(torch.autograd.Function, "apply", refuse)
    with torch.no_grad():
        output, left = layer(hidden)
    assert torch.equal(output, expected)
    assert left is bias_left
    assert (left is not None) == (bias and skip_bias_add)
    # Otherwise each layer of megatron-core would make it a tensor of its own, by one more autograd function.
    assert output._base is None


class Operators(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_tokens_of_one_sequence_are_multiplied_together(context):
    """Also where they are a transposed view, as megatron-core's embedding makes them, and the weight is frozen."""
    layer = linear(ColumnLinear, context, bias=False, skip_bias_add=False).requires_grad_(False)
    hidden = torch.randn(1, 7, 24)
    with torch.no_grad(), Operators() as operators:
        output, _ = layer(hidden.transpose(0, 1))
    assert "mm" in operators.names
    assert "bmm" not in operators.names
    assert torch.equal(output, layer(hidden.transpose(0, 1).clone(memory_format=torch.contiguous_format))[0])
    assert output._base is None


def test_another_weight_is_used(context):
    layer = linear(ColumnLinear, context, bias=False, skip_bias_add=False)
    hidden, weight = torch.randn(1, 1, 24), torch.randn(40, 24)
    with torch.no_grad():
        assert torch.equal(layer(hidden, weight)[0], hidden @ weight.t())


@pytest.mark.parametrize("kind", [ColumnLinear, RowLinear])
@pytest.mark.parametrize("enabled", [False, True])
def test_gradients_and_sequence_parallelism_are_left_to_megatron_core(kind, enabled, context, monkeypatch):
    layer = linear(kind, context, bias=False, skip_bias_add=False)
    base = kind.__mro__[1]
    assert base in (layers.ColumnParallelLinear, layers.RowParallelLinear)
    monkeypatch.setattr(base, "forward", lambda self, *args: ("megatron-core", None))
    with torch.set_grad_enabled(enabled):
        assert isinstance(layer(torch.randn(1, 1, 24))[0], str) is enabled
        layer.sequence_parallel = True
        assert layer(torch.randn(1, 1, 24))[0] == "megatron-core"
