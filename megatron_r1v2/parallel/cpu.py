"""Replacements for torch.cuda on a machine without a CUDA device, so that megatron-core runs there too.

megatron-core asks torch.cuda for its device, its random numbers and its clocks without checking that a device exists.
`REPLACEMENTS` lists every change, each with the megatron-core call that needs it. `parallel.groups.initialize` installs
them; an import never does. A test removes each row in turn and expects a failure, so a row that a newer megatron-core
no longer needs is noticed. `SHORTCUTS` are installed with them: without one a process only takes longer.
"""

from __future__ import annotations

import functools
import importlib
import logging
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.queues import Queue
from typing import cast

import torch

CPU = torch.device("cpu")
_RNG = "megatron.core.tensor_parallel.random"
_ORIGINAL = "replaced_for_cpu"

Function = Callable[..., object]


@dataclass(frozen=True)
class Replacement:
    """One replaced attribute."""

    module: str
    """The importable module of the attribute."""
    attribute: str
    """Its dotted name in the module."""
    make: Callable[[Function], Function]
    """Makes the replacement from the original."""
    needed_by: str
    """The call in megatron-core that fails, or computes something wrong, without the replacement."""

    @property
    def name(self) -> str:
        """Return the full dotted name."""
        return f"{self.module}.{self.attribute}"

    def install(self) -> None:
        """Put the replacement in place; a second call changes nothing."""
        owner, attribute = self._owner()
        original = getattr(owner, attribute)
        if not hasattr(original, _ORIGINAL):
            replacement = self.make(original)
            setattr(replacement, _ORIGINAL, original)
            setattr(owner, attribute, replacement)

    def remove(self) -> None:
        """Put the original back."""
        owner, attribute = self._owner()
        setattr(owner, attribute, getattr(getattr(owner, attribute), _ORIGINAL))

    def _owner(self) -> tuple[object, str]:
        *path, attribute = self.attribute.split(".")
        owner: object = importlib.import_module(self.module)
        for step in path:
            owner = getattr(owner, step)
        return owner, attribute


def install_if_needed() -> None:
    """Install every replacement on a machine without a CUDA device; change nothing elsewhere."""
    if torch.cuda.is_available():
        return
    # Torch notes, by identity and at the first use of a device context, which functions take their device from one. It
    # has to note the originals, which the replacements call. If it noted the replacements, `with torch.device("meta")`
    # would not affect torch.tensor and torch.zeros, and transformers would load models with uninitialised buffers.
    with torch.device("cpu"):
        torch.empty(0)
    for replacement in (*REPLACEMENTS, *SHORTCUTS):
        replacement.install()
    logging.getLogger(_RNG).addFilter(_is_worth_logging)


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Drop the warning that each fork of the RNG tracker logs."""
    # A changed CPU generator is a mistake with a GPU. Here the tracked states are states of the CPU generator.
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


class _Event:
    """A stand-in for torch.cuda.Event that records the time."""

    def __init__(self, *_: object, **__: object) -> None:
        self._seconds = 0.0

    def record(self, *_: object) -> None:
        # No queue as on a GPU: an operation on the CPU has finished when its call returns.
        self._seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        # Milliseconds, as torch.cuda.Event returns.
        return (end._seconds - self._seconds) * 1000


def _returns(value: object) -> Callable[[Function], Function]:
    """Make a replacement that ignores its arguments and returns `value`."""
    return lambda original: functools.wraps(original)(lambda *_, **__: value)


def _returns_self(original: Function) -> Function:
    return functools.wraps(original)(lambda self, *_, **__: self)


def _on_cpu(original: Function) -> Function:
    """Make a factory that puts tensors for "cuda" on the CPU."""

    @functools.wraps(original)
    def factory(*args: object, **kwargs: object) -> object:
        device = kwargs.get("device")
        if isinstance(device, (str, int, torch.device)) and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        # Pinning host memory needs a CUDA driver.
        kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    return factory


def _cuda_type_name(original: Function) -> Function:
    """Make a `Tensor.type` that names CPU tensors as CUDA tensors."""

    @functools.wraps(original)
    def type_name(self: torch.Tensor, *args: object, **kwargs: object) -> object:
        name = original(self, *args, **kwargs)
        # Only a call without arguments returns a name; with a dtype, `type` converts the tensor.
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) and self.device == CPU else name

    return type_name


def _get_rng_state(original: Function) -> Function:
    return functools.wraps(original)(lambda *_, **__: torch.get_rng_state())


def _set_rng_state(original: Function) -> Function:
    return functools.wraps(original)(lambda new_state, *_, **__: torch.set_rng_state(new_state))


def _manual_seed(original: Function) -> Function:
    return functools.wraps(original)(lambda seed: torch.manual_seed(seed))


def _event(original: Function) -> Function:
    # A fresh class, so that no attribute of an installed replacement stays on `_Event`.
    return type("Event", (_Event,), {"__doc__": original.__doc__})


class _QueueOfBytes:
    """A queue that a server process holds, and that passes bytes: the server need not import what they stand for."""

    def __init__(self, queue: Queue[bytes]) -> None:
        self._queue = queue

    def put(self, value: object) -> None:
        self._queue.put(pickle.dumps(value))

    def get_nowait(self) -> object:
        return pickle.loads(self._queue.get_nowait())  # written by a process of this rank


def _queue_of_bytes(original: Function) -> Function:
    return functools.wraps(original)(lambda: _QueueOfBytes(cast("Queue[bytes]", original())))


REPLACEMENTS: tuple[Replacement, ...] = (
    Replacement("torch.cuda", "current_device", _returns(CPU), "ColumnParallelLinear.__init__ and nearly every layer"),
    Replacement("torch.cuda", "get_rng_state", _get_rng_state, "CudaRNGStatesTracker.add"),
    Replacement("torch.cuda", "manual_seed", _manual_seed, "CudaRNGStatesTracker.add: the seed of each tracked state"),
    Replacement(_RNG, "_get_cuda_rng_state", _get_rng_state, "CudaRNGStatesTracker.fork"),
    Replacement(_RNG, "_set_cuda_rng_state", _set_rng_state, "CudaRNGStatesTracker.fork"),
    Replacement("torch.cuda", "synchronize", _returns(None), "P2PCommunicator._communicate; FileSystemWriterAsync"),
    Replacement("torch.cuda", "Event", _event, "DynamicInferenceEngine.reset"),
    Replacement("torch.cuda.nvtx", "_nvtx.rangePushA", _returns(None), "DynamicInferenceEngine.async_forward"),
    Replacement("torch.cuda.nvtx", "_nvtx.rangePop", _returns(None), "DynamicInferenceEngine.async_forward"),
    Replacement("torch", "empty_like", _on_cpu, "TextGenerationController: pinned copies of request metadata"),
    Replacement("torch", "Tensor.cuda", _returns_self, "LanguageModule: tied embeddings over pipeline stages"),
    Replacement("torch", "tensor", _on_cpu, "MixedPrecisionOptimizer.__init__: found_inf"),
    Replacement("torch", "zeros", _on_cpu, "forward_backward_no_pipelining: total_num_tokens"),
    Replacement("torch", "Tensor.type", _cuda_type_name, "DistributedOptimizer._build_model_and_main_param_groups"),
)
SHORTCUTS: tuple[Replacement, ...] = (
    Replacement(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "_get_write_results_queue",
        _queue_of_bytes,
        "the first save of a process: the server of its queue imports torch to read a result, for seconds",
    ),
)
