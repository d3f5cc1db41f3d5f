"""A GPU by name on a torch without CUDA: Python takes the branches of the cluster, fakes are on "cuda".

Installed in a process of its own, which rehearses one rank and ends; nothing is put back. C++ (autograd, factories)
is told that fakes are on the CPU, see `FakeTensors`; what it would decide by the device is decided here.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import cast

import numpy
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_r1v2.rehearsal.fake_tensors import FakeTensors, set_values, values_of
from megatron_r1v2.rehearsal.watch import original, replace

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
Function = Callable[..., object]

_FACTORIES = (
    *("arange", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones", "ones_like"),
    *("rand", "rand_like", "randint", "randn", "randn_like", "randperm", "scalar_tensor", "zeros", "zeros_like"),
)
# torch looks no further than this into lists of numbers for fakes.
_MOST_SEARCHED = 5000


class _Stream:
    """A stand-in for torch.cuda.Stream: nothing is queued, so nothing is waited for."""

    device = CUDA
    cuda_stream = 0

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, *_: object) -> None: ...

    def wait_event(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


class _Event:
    """A stand-in for torch.cuda.Event that records the time."""

    def __init__(self, *_: object, **__: object) -> None:
        self._seconds = 0.0

    def record(self, *_: object) -> None:
        self._seconds = time.perf_counter()

    def wait(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        return (end._seconds - self._seconds) * 1000


def install(*, gpus_per_node: int, memory_bytes: int, usable_bytes: int | None = None) -> None:
    """Make torch say that it has GPUs.

    Args:
        usable_bytes: the part of a GPU's memory that tensors may take; None: all.
    """
    functions = _cuda_functions(gpus_per_node, memory_bytes)
    functions["mem_get_info"] = _free_memory(memory_bytes, memory_bytes if usable_bytes is None else usable_bytes)
    for name, value in functions.items():
        replace(torch.cuda, name, value)
        if hasattr(torch.cuda.random, name):
            replace(torch.cuda.random, name, value)
    # torch asks when a collective raises, and would hide its error behind that of having no NCCL.
    replace(torch.cuda.nccl, "version", lambda: (2, 0))
    for name in ("range_push", "range_pop"):
        replace(torch.cuda.nvtx, name, lambda *_: 0)
    replace(torch.cuda.nvtx, "_nvtx", SimpleNamespace(rangePushA=lambda *_: 0, rangePop=lambda *_: 0))
    for name in _FACTORIES:
        replace(torch, name, _with_named_device(original(torch, name)))
    replace(torch, "as_tensor", _as_tensor_maker(torch.as_tensor))
    replace(torch, "Generator", _CpuGenerator)
    replace(F, "scaled_dot_product_attention", _attention_chooser(F.scaled_dot_product_attention))
    _teach_fakes()


def install_for_fakes() -> None:
    """Let fakes be moved, listed, copied and cast as tensors with memory are; needed on the CPU too."""
    replace(torch, "tensor", _tensor_maker(torch.tensor))
    replace(torch.nn.Module, "_apply", _apply)
    replace(FakeTensor, "tolist", _tolist)
    replace(FakeTensor, "__array__", lambda self, *_, **__: numpy.array(self.tolist()))
    replace(FakeTensor, "__deepcopy__", _deepcopy)


def _cuda_functions(gpus_per_node: int, memory_bytes: int) -> dict[str, object]:
    state = torch.zeros(16, dtype=torch.uint8)
    properties = SimpleNamespace(
        name="rehearsed GPU",
        major=9,
        minor=0,
        total_memory=memory_bytes,
        multi_processor_count=132,
        uuid="0",
        warp_size=32,
    )
    does_nothing = (
        *("set_device", "synchronize", "set_stream", "set_rng_state", "manual_seed", "manual_seed_all"),
        *("seed", "empty_cache", "reset_peak_memory_stats", "init", "_lazy_init", "_lazy_call"),
    )
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": gpus_per_node,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "get_device_name": properties.name,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "initial_seed": 0,
        "is_current_stream_capturing": False,
        "is_bf16_supported": True,
    }
    return {
        **{name: _returns(None) for name in does_nothing},
        **{name: _returns(value) for name, value in answers.items()},
        "memory_stats": lambda *_, **__: defaultdict(int),
        "get_rng_state": lambda *_, **__: state.clone(),
        "Event": _Event,
        "Stream": _Stream,
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "stream": lambda stream: stream or _Stream(),
    }


def _free_memory(memory_bytes: int, usable_bytes: int) -> Function:
    """Make a torch.cuda.mem_get_info that knows what is counted."""

    def mem_get_info(*_: object) -> tuple[int, int]:
        from megatron_r1v2.generation.cache_size import GAPS  # megatron-core is not imported before this is installed

        mode = _current_mode()
        if mode is None:
            return usable_bytes, memory_bytes
        mode.answer("free memory of a GPU: what tensors may take of it, less what is counted")
        # The rest is the share of CUDA, NCCL and the allocator's gaps; who asks takes the gaps off again.
        return usable_bytes + int(memory_bytes * GAPS) - mode.ledger.held, memory_bytes

    return mem_get_info


def _returns(value: object) -> Function:
    return lambda *_, **__: value


def _teach_fakes() -> None:
    """Give fakes the methods that C++ would answer by the device that it was told."""
    original_type, original_to = torch.Tensor.type, torch.Tensor.to

    def type_of(self: FakeTensor, dtype: object = None, *args: object, **kwargs: object) -> object:
        if dtype is not None:
            return original_type(self, dtype, *args, **kwargs)  # type: ignore[call-overload]
        name = original_type(self)
        return name.replace("torch.", "torch.cuda.", 1) if self.is_cuda and "cuda" not in name else name

    def to(self: FakeTensor, *args: object, **kwargs: object) -> torch.Tensor:
        device, rest, kwargs = _split_device(args, kwargs)
        moved = original_to(self, *rest, **kwargs) if rest or kwargs else self  # type: ignore[call-overload]
        return moved if device is None or device == moved.device else _copy(moved, device)

    methods: dict[str, object] = {
        "type": type_of,
        "to": to,
        "cuda": lambda self, *_, **__: self.to(device=CUDA),
        "cpu": lambda self, **_: self.to(device=torch.device("cpu")),
        "is_cuda": property(lambda self: self.fake_device.type == "cuda"),
        "is_cpu": property(lambda self: self.fake_device.type == "cpu"),
        "get_device": lambda self: self.fake_device.index if self.fake_device.type == "cuda" else -1,
        "pin_memory": lambda self, *_: self,
        "is_pinned": lambda *_: False,
    }
    for name, method in methods.items():
        replace(FakeTensor, name, method)
    # Without a kernel for CUDA C++ would take this one apart, and seven tensors would live where CUDA makes one. The
    # kernel itself never runs: fakes ask for its shape alone.
    torch.library.impl("aten::silu_backward", "CUDA", torch.empty_like)


def _split_device(
    args: Sequence[object], kwargs: dict[str, object]
) -> tuple[torch.device | None, list[object], dict[str, object]]:
    """Take the device out of the arguments of Tensor.to."""
    rest, kwargs = list(args), dict(kwargs)
    device = kwargs.pop("device", None)
    other = kwargs.pop("other", None)
    if rest and isinstance(rest[0], torch.Tensor):
        other = rest.pop(0)
    if isinstance(other, torch.Tensor):
        device = other.device
        rest.insert(0, other.dtype)
    elif rest and (rest[0] is None or isinstance(rest[0], str | torch.device | int)):
        device = rest.pop(0)
    return (None if device is None else named_device(device)), rest, kwargs


def named_device(device: object) -> torch.device:
    """Return a device that is given by number or without one, by name and number."""
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(cast(str, device))
    return CUDA if found.type == "cuda" and found.index is None else found


def _copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    mode = _current_mode()
    if mode is None:
        return cast(torch.Tensor, aten._to_copy.default(tensor, device=device))
    # Only here "cpu" is meant, and not what C++ was told.
    mode.moves_to_cpu = device.type == "cpu"
    try:
        return cast(torch.Tensor, aten._to_copy.default(tensor, device=device))
    finally:
        mode.moves_to_cpu = False


def _current_mode() -> FakeTensors | None:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    stack = _get_current_dispatch_mode_stack()
    return next((mode for mode in reversed(stack) if isinstance(mode, FakeTensors)), None)


def _with_named_device(function: Function) -> Function:
    """Make a factory that is told a device by name: for a number, C++ would ask which accelerator is meant."""

    @functools.wraps(function)
    def factory(*args: object, **kwargs: object) -> object:
        if kwargs.get("device") is not None:
            kwargs["device"] = named_device(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return factory


def _tensor_maker(function: Function) -> Function:
    """Make a torch.tensor that asks fakes for their numbers, and makes tensors for "cuda" on the CPU first."""

    @functools.wraps(function)
    def make(data: object, *args: object, **kwargs: object) -> object:
        kwargs.pop("pin_memory", None)
        if _has_fakes(data):
            data = _numbers(data)
        device = kwargs.get("device")
        if device is None or named_device(device).type != "cuda":
            return function(data, *args, **kwargs)
        # torch lifts plain numbers in C++, where this device does not exist.
        del kwargs["device"]
        needs_grad = kwargs.pop("requires_grad", False)
        made = cast(torch.Tensor, function(data, *args, **kwargs))
        return made.to(device=CUDA).requires_grad_(bool(needs_grad))

    return make


def _as_tensor_maker(function: Function) -> Function:
    @functools.wraps(function)
    def make(data: object, dtype: torch.dtype | None = None, device: object = None) -> object:
        if isinstance(data, torch.Tensor):
            return data.to(device=named_device(device or data.device), dtype=dtype or data.dtype)
        made = cast(torch.Tensor, function(data, dtype=dtype))
        return made if device is None else made.to(device=named_device(device))

    return make


def _has_fakes(data: object) -> bool:
    if isinstance(data, list | tuple):
        return len(data) < _MOST_SEARCHED and any(map(_has_fakes, data))
    return isinstance(data, FakeTensor)


def _numbers(data: object) -> object:
    if isinstance(data, list | tuple):
        return [_numbers(item) for item in data]
    return data.tolist() if isinstance(data, FakeTensor) else data


class _CpuGenerator:
    """A torch.Generator for any device; nothing is drawn from it. A class, since annotations name it."""

    def __new__(cls, device: object = None) -> object:  # type: ignore[misc]  # noqa: ARG004  # another class, as torch's
        return torch._C.Generator()


def _attention_chooser(function: Function) -> Function:
    """Make a scaled_dot_product_attention that runs the flash kernel where a GPU would."""

    @functools.wraps(function)
    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **how: object,
    ) -> object:
        # C++ would choose by the device that it is told. fp32 and masks have no flash kernel.
        is_flash = query.is_cuda and attn_mask is None and query.dtype in (torch.bfloat16, torch.float16)
        if isinstance(query, FakeTensor) and is_flash:
            flash = aten._scaled_dot_product_flash_attention
            return flash(query, key, value, dropout_p, is_causal, scale=how.get("scale"))[0]
        # The device that C++ is told of has these.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            return function(query, key, value, attn_mask, dropout_p, is_causal, **how)

    return attend


def _tolist(self: FakeTensor) -> object:
    values, mode = values_of(self), _current_mode()
    if values is None:
        assert mode is not None, "a fake outside of its mode has no numbers"
        return _nested(mode.constant_for(self.dtype), tuple(self.shape))  # one question for all of them
    with torch._C._DisableTorchDispatch():
        return values.tolist()


def _nested(constant: object, shape: tuple[int, ...]) -> object:
    return [_nested(constant, shape[1:]) for _ in range(shape[0])] if shape else constant


def _apply(self: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> torch.nn.Module:
    """Do what Module._apply does for tensors with memory: `param.data = ...`. torch would swap fakes, and refuses."""
    if recurse:
        for module in self.children():
            _apply(module, fn)
    for parameter in self._parameters.values():
        if parameter is None:
            continue
        with torch.no_grad():
            applied = fn(parameter)
        if applied is not parameter:
            values = values_of(applied)
            parameter.data = applied
            if isinstance(parameter, FakeTensor):
                set_values(parameter, values)
                parameter.fake_device = cast(FakeTensor, applied).fake_device
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self


def _deepcopy(self: FakeTensor, memo: dict[int, object]) -> torch.Tensor:
    """Copy a fake, whose storage has nothing to copy."""
    with torch.no_grad():
        copied = self.detach().clone().requires_grad_(self.requires_grad)
    memo[id(self)] = copied
    return copied
