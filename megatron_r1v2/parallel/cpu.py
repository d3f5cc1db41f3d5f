"""What lets megatron-core run without a CUDA device; installed by `parallel.groups.initialize`, never on import.

megatron-core asks torch.cuda for its device, its random numbers and its clocks without looking whether there is one.
`REPLACEMENTS` is all that is changed, each row with the megatron-core call that needs it. A test takes each row out in
turn and fails where nothing breaks, so a row that a newer megatron-core no longer needs is found.
"""

from __future__ import annotations

import functools
import importlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

CPU = torch.device("cpu")
_RNG = "megatron.core.tensor_parallel.random"


@dataclass(frozen=True)
class Replacement:
    """One attribute that is replaced."""

    module: str
    """Importable module that holds it."""
    attribute: str
    """Its dotted name in the module."""
    make: Callable[[Any], Any]
    """From the original to what takes its place."""
    needed_by: str
    """The call in megatron-core that fails, or does the wrong thing, without it."""

    @property
    def name(self) -> str:
        """Return the full dotted name."""
        return f"{self.module}.{self.attribute}"

    def install(self) -> None:
        """Put the replacement in place; a second call changes nothing."""
        owner, attribute = self._owner()
        original = getattr(owner, attribute)
        if not hasattr(original, "replaced_for_cpu"):
            replacement = self.make(original)
            replacement.replaced_for_cpu = original
            setattr(owner, attribute, replacement)

    def remove(self) -> None:
        """Put the original back."""
        owner, attribute = self._owner()
        setattr(owner, attribute, getattr(owner, attribute).replaced_for_cpu)

    def _owner(self) -> tuple[Any, str]:
        *path, attribute = self.attribute.split(".")
        owner = importlib.import_module(self.module)
        for step in path:
            owner = getattr(owner, step)
        return owner, attribute


def install_if_needed() -> None:
    """Install every replacement where no CUDA device exists; do nothing where one does."""
    if torch.cuda.is_available():
        return
    # When a device context is first used, torch notes by identity which functions take their device from one. It must
    # note the originals, which the replacements call: with the replacements noted, `with torch.device("meta")` has no
    # effect on torch.tensor and torch.zeros, and transformers loads models with uninitialised buffers.
    with torch.device("cpu"):
        torch.empty(0)
    for replacement in REPLACEMENTS:
        replacement.install()
    logging.getLogger(_RNG).addFilter(_is_worth_logging)


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Drop the warning of every fork of the RNG tracker: here the tracked states are those of the CPU generator."""
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


class _Event:
    """Stands for torch.cuda.Event: work on a CPU is done when it was asked for, so an event is a time."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._seconds = 0.0

    def record(self, *_: Any) -> None:
        self._seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return (end._seconds - self._seconds) * 1000


def _returns(value: Any) -> Callable[[Any], Any]:
    """Make a replacement that ignores its arguments and returns `value`."""
    return lambda original: functools.wraps(original)(lambda *_, **__: value)


def _returns_self(original: Any) -> Any:
    return functools.wraps(original)(lambda self, *_, **__: self)


def _on_cpu(original: Any) -> Any:
    """Send device="cuda" to the CPU, and drop pin_memory, which needs a CUDA driver."""

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    return factory


def _cuda_type_name(original: Any) -> Any:
    @functools.wraps(original)
    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = original(self, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if not args and not kwargs and self.device == CPU else name

    return type_name


def _get_rng_state(original: Any) -> Any:
    return functools.wraps(original)(lambda *_, **__: torch.get_rng_state())


def _set_rng_state(original: Any) -> Any:
    return functools.wraps(original)(lambda new_state, *_, **__: torch.set_rng_state(new_state))


def _manual_seed(original: Any) -> Any:
    return functools.wraps(original)(lambda seed: torch.manual_seed(seed))


def _event(original: Any) -> Any:
    return type("Event", (_Event,), {"__doc__": original.__doc__})


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
