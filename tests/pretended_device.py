"""A GPU that is pretended: real values in host memory, each tensor marked as the device's or the host's.

Python takes the branches of the cluster, real ranks talk over gloo, and an operation that CUDA would refuse (tensors
on two devices, a host tensor in a collective, `numpy()` of a device tensor) fails where it is called. The rehearsal
finds such mistakes too, on one rank without values; here whole stages run with all ranks, their backward passes and
evaluation included.

Installed in a process of its own, which runs a test and ends; nothing is put back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_r1v2.parallel import cpu, groups
from megatron_r1v2.rehearsal import fake_cuda
from megatron_r1v2.rehearsal.fake_cuda import CUDA, named_device

aten = torch.ops.aten
# They move between devices.
_MOVING = ("aten::copy_", "aten::_to_copy")
# CUDA takes indices of the host for tensors of the device, and copies them.
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_OBJECTS = ("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "barrier")
_FROM_HOST = ("from_numpy", "frombuffer")


class RefusedByCuda(RuntimeError):
    """An operation that a GPU would refuse."""


@contextmanager
def pretended_device(gpus: int = 8) -> Iterator[Operators]:
    """Pretend inside the block that each rank has a GPU, and give out the counters of its operators."""
    fake_cuda.install(gpus_per_node=gpus, memory_bytes=80 * 2**30)
    for name in _FROM_HOST:
        setattr(torch, name, _marked_as_host(getattr(torch, name)))
    for replacement in cpu.REPLACEMENTS:
        if replacement.needed_by.startswith("CudaRNGStatesTracker"):
            replacement.install()  # this device draws with the CPU's generator
    groups._backend = lambda: "gloo"
    torch.compiler.set_stance("force_eager")  # what is compiled for a GPU
    with _Requests(), Operators() as operators:
        yield operators


def is_on_device(tensor: torch.Tensor) -> bool | None:
    """Return whether a tensor is marked as the device's; None: it has no mark, as what C++ makes for itself."""
    if isinstance(tensor, ShardedTensor):  # of a checkpoint; it has no storage of its own
        tensor = tensor.local_shards()[0].tensor
    return getattr(tensor.untyped_storage(), "is_on_device", None)


def _mark(tensor: torch.Tensor, on_device: bool) -> torch.Tensor:
    tensor.untyped_storage().is_on_device = on_device
    return tensor


def _marked_as_host(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: _mark(function(*args, **kwargs), False)


def _efficient_attention(q, k, v, bias, compute_lse, dropout=0.0, causal=False, *, scale=None):
    output, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal, scale=scale)
    # This kernel pads it to a multiple.
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)
    return output, lse, *(torch.zeros((), dtype=torch.int64) for _ in range(2))


def _efficient_attention_backward(grad, q, k, v, bias, output, lse, *rest, scale=None):
    _seed, _offset, dropout, _wanted, causal = (*rest, False)[:5]
    lse = lse[:, :, : q.shape[2]].contiguous()
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return *backward(grad, q, k, v, output, lse, dropout, causal, scale=scale), None


def _flash_attention(q, k, v, dropout=0.0, causal=False, return_debug_mask=False, *, scale=None):
    output, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal, scale=scale)
    state = torch.zeros(2, dtype=torch.uint64)
    return output, lse, None, None, q.shape[2], k.shape[2], state, state[:0], state[:0]


def _flash_attention_backward(grad, q, k, v, output, lse, cum_q, cum_k, max_q, max_k, dropout, causal, *_, scale=None):
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad, q, k, v, output, lse, dropout, causal, scale=scale)


_KERNELS = {
    aten._scaled_dot_product_efficient_attention.default: _efficient_attention,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_attention_backward,
    aten._scaled_dot_product_flash_attention.default: _flash_attention,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_attention_backward,
}
"""The CPU's kernels in the place of those that only a GPU has."""


class Operators(TorchDispatchMode):
    """Checks each operator, those of backward passes too, and marks what it returns as its inputs are."""

    def __init__(self) -> None:
        super().__init__()
        self.on_device = 0
        """Operators on tensors of the device."""
        self.collectives = 0
        """Those on tensors of the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        marks = [is_on_device(tensor) for tensor in inputs]
        self.on_device += True in marks
        if func.namespace == "c10d":
            self.collectives += True in marks
            _check_collective(name, marks)
        elif True in marks and False in marks and name not in _MOVING:
            _check_devices(name, inputs, marks)
        with torch._C.DisableTorchFunction():  # a device in the arguments is what C++ believes, not a request
            result = _KERNELS.get(func, func)(*args, **kwargs)
        # What `_move` asks for is marked there, once more.
        if name != "aten::copy_" and (True in marks or False in marks):
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and is_on_device(leaf) is None:
                    _mark(leaf, True in marks)
        return result


def _check_devices(name: str, inputs: list[torch.Tensor], marks: list[bool | None]) -> None:
    # Backward passes begin with zeros that C++ makes, which have no mark.
    is_indexing = name in _INDEXING and marks[0] is not False
    # Numbers of the host join tensors of the device, but not the other way round.
    wrong = [
        tuple(tensor.shape)
        for tensor, mark in zip(inputs, marks, strict=True)
        if mark is False and tensor.dim() > 0 and not (is_indexing and not tensor.is_floating_point())
    ]
    if wrong:
        raise RefusedByCuda(f"{name} of tensors on two devices, those of the host {wrong} at {_line()}")


def _check_collective(name: str, marks: list[bool | None]) -> None:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name in _OBJECTS and frame.f_globals.get("__name__") == dist.distributed_c10d.__name__:
            return  # torch moves pickled objects to the device of the group
        frame = frame.f_back
    if False in marks:
        raise RefusedByCuda(f"{name} of a tensor of the host at {_line()}")


def _line() -> str:
    """Return the innermost line outside of torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_globals.get("__name__", "").partition(".")[0] == "torch" or frame.f_code.co_filename == __file__
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"


class _Requests(TorchFunctionMode):
    """Answers for the device of a tensor, and marks what is asked for on one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__" and func.__self__ in _PROPERTIES:
            return _PROPERTIES[func.__self__](func, args[0])
        if name == "_parse_to":
            return func(*args, **kwargs)  # Module.to reads its arguments; each tensor comes here by itself
        if func is torch.autograd.backward:
            return self._backward(*args, **kwargs)
        kwargs.pop("pin_memory", None)
        if func in _METHODS:
            return _METHODS[func](func, *args, **kwargs)
        if kwargs.get("device") is None:
            result = func(*args, **kwargs)
            if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs))):
                for leaf in tree_leaves(result):
                    if isinstance(leaf, torch.Tensor) and is_on_device(leaf) is None:
                        _mark(leaf, False)
            return result
        device = named_device(kwargs["device"])
        if device.type == "meta":
            return func(*args, **kwargs)
        kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        return _mark(result, device.type == "cuda") if isinstance(result, torch.Tensor) else result

    def _backward(self, tensors: Any, grad_tensors: Any = None, inputs: Any = None, **kwargs: Any) -> None:
        """Do what `torch.autograd.backward` does, with this mode on: recomputation asks for devices too."""
        tensors = (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
        given = (grad_tensors,) if isinstance(grad_tensors, torch.Tensor) else grad_tensors or [None] * len(tensors)
        grads = torch.autograd._make_grads(tensors, tuple(given), is_grads_batched=False)
        with self:
            torch.autograd.Variable._execution_engine.run_backward(
                tensors,
                grads,
                bool(kwargs.get("retain_graph") or kwargs.get("create_graph")),
                bool(kwargs.get("create_graph")),
                tuple(inputs or ()),
                allow_unreachable=True,
                accumulate_grad=True,
            )


def _move(_: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Do what `Tensor.to` does; a tensor that changes its device is copied."""
    given = [*args, kwargs.get("device"), kwargs.get("dtype"), kwargs.get("other")]
    other = next((value for value in given if isinstance(value, torch.Tensor)), None)
    if other is not None:
        given += [CUDA if is_on_device(other) else "cpu", other.dtype]
    # Bools say whether to wait and whether to copy, and are whole numbers too.
    wanted = [value for value in given if isinstance(value, str | int | torch.device) and not isinstance(value, bool)]
    dtype = next((value for value in given if isinstance(value, torch.dtype)), tensor.dtype)
    is_copy = kwargs.get("copy", False)
    converted = tensor.to(dtype, copy=is_copy)
    if not wanted:
        return converted
    device = named_device(wanted[0])
    if device.type == "meta":
        return converted.to(device)
    on_device = device.type == "cuda"
    if is_on_device(converted) is on_device:
        return converted
    is_shared = converted.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    return _mark(converted.clone() if is_shared else converted, on_device)


def _numpy(func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if is_on_device(tensor):
        raise RefusedByCuda(f"numpy() of a tensor of the device at {_line()}")
    return func(tensor, *args, **kwargs)


def _type(func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    result = func(tensor, *args, **kwargs)
    return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) and is_on_device(tensor) else result


_METHODS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.to: _move,
    torch.Tensor.cuda: lambda func, tensor, *_, **__: _move(func, tensor, CUDA),
    torch.Tensor.cpu: lambda func, tensor, *_, **__: _move(func, tensor, "cpu"),
    torch.Tensor.numpy: _numpy,
    torch.Tensor.__array__: _numpy,
    torch.Tensor.type: _type,
    torch.Tensor.pin_memory: lambda _, tensor, *__: tensor,
    torch.Tensor.is_pinned: lambda *_: False,
    torch.Tensor.record_stream: lambda *_: None,
    torch.Tensor.get_device: lambda _, tensor: 0 if is_on_device(tensor) else -1,
}
_PROPERTIES: dict[Any, Callable[..., Any]] = {
    torch.Tensor.device: lambda func, tensor: CUDA if is_on_device(tensor) else func(tensor),
    torch.Tensor.is_cuda: lambda _, tensor: bool(is_on_device(tensor)),
    torch.Tensor.is_cpu: lambda _, tensor: not is_on_device(tensor),
}
