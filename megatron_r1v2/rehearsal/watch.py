"""A dispatch mode that sees every operator: bytes that live, FLOPs by phase, collectives. It changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from megatron_r1v2.rehearsal.collectives import Collective, CollectiveLog
from megatron_r1v2.rehearsal.ledger import MemoryLedger

Operator = torch._ops.OpOverload
_PEER_KINDS = ("send", "recv_", "broadcast_")


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call, misc]  # torch leaves the base class untyped
    """Watches real tensors; `FakeTensors` watches those without memory in the same way."""

    def __init__(self, device_type: str, *, on_phase: Callable[[str], object] = lambda _: None) -> None:
        """Begin with nothing.

        Args:
            device_type: of the device whose bytes are the rank's memory; all other tensors are the host's.
            on_phase: told the name of each phase that begins, and of the one around it when it has ended.
        """
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves the base class untyped
        self.device_type = device_type
        self.on_phase = on_phase
        self.ledger = MemoryLedger()
        self.host = MemoryLedger()
        self.collectives = CollectiveLog()
        self.flops: Counter[str] = Counter()
        self.num_operators = 0

    @override
    def __torch_dispatch__(
        self, func: Operator, types: object, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        """Run an operator, and note what it made, computed and sent."""
        kwargs = kwargs or {}
        self.num_operators += 1
        if func.namespace == "c10d":
            self.note_collective(func, args, kwargs)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        self.note(func, args, kwargs, result, tensors_in((args, kwargs)))
        return result

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what happens inside the block."""
        with self._announced(name), self.ledger.phase(name), self.host.phase(name):
            yield

    @contextmanager
    def phase_alone(self, name: str) -> Iterator[None]:
        """Name what happens inside the block, and is no part of the phases around it."""
        with self._announced(name), self.ledger.phase(name, alone=True), self.host.phase(name, alone=True):
            yield

    @contextmanager
    def _announced(self, name: str) -> Iterator[None]:
        around = self.ledger.current_phase
        self.on_phase(name)
        yield
        self.on_phase(around)  # not after an error: the phase that it has ended stays the last one

    def add_flops(self, number: int) -> None:
        """Count the FLOPs of an operator, or of a kernel that torch does not know."""
        self.flops[self.ledger.current_phase] += number
        self.ledger.add_flops(number)

    def note(
        self,
        func: Operator,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        result: object,
        inputs: Sequence[torch.Tensor],
    ) -> None:
        """Count the storages that an operator has made, and its FLOPs.

        Args:
            inputs: the tensors among its arguments.
        """
        made = [result] if isinstance(result, torch.Tensor) else tensors_in(result)
        if made:
            self.count_tensors(made, inputs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.add_flops(flop_registry[packet](*args, **kwargs, out_val=result))

    def count_tensors(self, made: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor] = ()) -> None:
        """Count the storages of tensors, each with its device."""
        here = [tensor for tensor in made if tensor.device.type == self.device_type]
        if here:
            self.ledger.add(here, inputs)
        if len(here) < len(made):
            self.host.add([tensor for tensor in made if tensor.device.type == "cpu"], inputs)

    def note_collective(self, func: Operator, args: Sequence[object], kwargs: Mapping[str, object]) -> Collective:
        """Note a call of torch.distributed and return it."""
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        group = group_in(leaves)
        ranks = tuple(dist.get_process_group_ranks(group)) if group is not None else ()
        kind = func._schema.name.partition("::")[2]
        # The third argument of these is the other rank, by its number in the group.
        peer = ranks[int(args[2])] if kind in _PEER_KINDS and ranks else -1  # type: ignore[call-overload]
        call = Collective(
            kind=kind,
            ranks=ranks,
            dtype=str(tensors[0].dtype).removeprefix("torch.") if tensors else "",
            count=sum(tensor.numel() for tensor in tensors),
            num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            peer=peer,
            phase=self.ledger.current_phase,
        )
        self.collectives.add(call)
        return call


def tensors_in(values: object) -> list[torch.Tensor]:
    """Return the tensors in nested values."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


@contextmanager
def unwatched() -> Iterator[None]:
    """Run the block on real tensors that nobody counts: files, samples, what another process would do."""
    with _disable_current_modes():
        yield


def original(owner: object, name: str) -> Any:
    """Return an attribute that is about to be replaced."""
    # Through a class, so that a static method or a property would show.
    return getattr(owner, name)


def replace(owner: object, name: str, value: object) -> None:
    """Replace an attribute of a module or a class: the one way to do so in a rehearsal, in its own process, for good.

    Raises:
        AttributeError: it has none of this name: what is replaced has moved.
    """
    original(owner, name)
    setattr(owner, name, value)


def group_in(values: object) -> dist.ProcessGroup | None:
    """Return the process group among the arguments of a collective; None: it has none."""
    groups = (leaf for leaf in tree_leaves(values) if type(leaf).__name__ == "ScriptObject")
    return next((dist.ProcessGroup.unbox(each) for each in groups if "ProcessGroup" in str(each._type())), None)
