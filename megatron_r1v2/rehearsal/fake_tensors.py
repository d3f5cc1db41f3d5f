"""Tensors without memory that still know small values, so that one process runs one rank of a large layout.

Every tensor is one of torch's FakeTensors: shape, dtype, device, autograd graph, size of its storage, no bytes. Small
tensors whose inputs are known have their values too, computed by the same operator on plain CPU tensors; views share
them, so that writes in place are seen. Block tables, lengths, token ids and masks are therefore true.

Where the program asks for a number that nobody can know (is the gradient finite?), a rule answers, and the question is
noted with the line that asked: nothing is assumed in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from megatron_r1v2.rehearsal.collectives import Collective
from megatron_r1v2.rehearsal.ledger import running_line
from megatron_r1v2.rehearsal.watch import Operator, Watch, group_in, tensors_in

aten = torch.ops.aten
Number = bool | int | float
Incoming = Callable[[Collective, torch.Tensor], torch.Tensor | None]
"""(call, tensor that is received into) to the values that another rank sends; None: no rule knows them."""

DIFFERENCES = frozenset({"check_shared_attention"})
"""Functions that ask how far two computations of one thing are apart."""
_MOST_KNOWN_INTEGERS = 4_000_000
"""A page table of 256 sequences of 128k tokens, with room."""
_MOST_KNOWN_FLOATS = 70_000
_KNOWN = "known_values"
_FACTORIES = frozenset(
    [
        "arange",
        "empty",
        "empty_like",
        "empty_strided",
        "eye",
        "full",
        "full_like",
        "linspace",
        "new_empty",
        "new_empty_strided",
        "new_full",
        "new_ones",
        "new_zeros",
        "ones",
        "ones_like",
        "rand",
        "randint",
        "randn",
        "randperm",
        "scalar_tensor",
        "zeros",
        "zeros_like",
    ]
)
_MOST_BOOKKEEPING = 4096
"""Elements of the tensors that a step's bookkeeping is done on."""
_RESHAPING = ("as_strided_", "detach_", "resize_", "set_", "squeeze_", "t_", "transpose_", "unsqueeze_")
_GROWING = ("constant_pad_nd", "new_empty", "new_full", "new_ones", "new_zeros", "repeat", "tile")
# In place but not of values, or large tensors of small ones.
_NO_BOOKKEEPING = frozenset([*_RESHAPING, *_GROWING])
# The shape of what they return is in the values.
_DYNAMIC = (
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
)
_INDEXING = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,  # what index_put_ becomes under autograd
)
_ASKING = (aten._local_scalar_dense.default, aten.equal.default)
# Run here, or by torch for fakes, without a look at the devices.
_UNCHECKED = (*_DYNAMIC, *_INDEXING, aten.equal.default)


class UnknownValues(RuntimeError):
    """The program needs values for a shape that no rule can answer."""


class FakeTensors(Watch):
    """The dispatch mode under which every new tensor is a fake."""

    def __init__(
        self, device_type: str, *, hides_device: bool = False, on_phase: Callable[[str], object] = lambda _: None
    ) -> None:
        """Begin with nothing.

        Args:
            hides_device: whether C++ is told that fakes are on the CPU: on a build without CUDA it has no device guard
                for others, and would end the process.
            on_phase: see Watch.
        """
        super().__init__(device_type, on_phase=on_phase)
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.hides_device = hides_device
        self.moves_to_cpu = False
        """Whether a copy to the CPU is asked for in so many words; else "cpu" is what C++ was told of a fake."""
        self.questions: Counter[tuple[str, str]] = Counter()
        """The number of answers of a rule, by the rule and the line that asked."""
        self.unsupported: Counter[str] = Counter()
        """Operators that could not be computed on known values."""
        self.incoming: Incoming | None = None
        """Gives what another rank sends, where a rule knows it."""

    def __enter__(self) -> FakeTensors:
        self.fakes.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]  # torch leaves the base class untyped
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]  # torch leaves the base class untyped
        self.fakes.__exit__(kind, error, trace)

    @override
    def __torch_dispatch__(
        self, func: Operator, types: object, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        """Run an operator on fakes, and on the values where they are known."""
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default and self.hides_device:
            return torch.device("cpu")
        self.num_operators += 1
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs)
        inputs = tensors_in((args, kwargs))
        is_told_cpu = self.hides_device and not self.moves_to_cpu and kwargs.get("device") == torch.device("cpu")
        if is_told_cpu and any(isinstance(each, FakeTensor) and each.fake_device.type == "cuda" for each in inputs):
            # C++ has filled in the device of an input, as it was told.
            kwargs["device"] = torch.device("cuda", 0)
        if not all(isinstance(each, FakeTensor) for each in inputs):
            # Operators on real tensors alone would run, which those of "cuda" cannot.
            args, kwargs = tree_map_only(torch.Tensor, self._as_fake, (args, kwargs))
            inputs = tensors_in((args, kwargs))
        if func in _UNCHECKED:
            _check_devices(func, inputs)
        if func in _ASKING:
            return self._ask(func, args)
        if func in _INDEXING and any(_is_mask(index) for index in cast(Sequence[object], args[1])):
            args = (args[0], self._indices_of_masks(cast(Sequence[object], args[1])), *args[2:])
            inputs = tensors_in((args, kwargs))
        if func in _DYNAMIC:
            return self._run_dynamic(func, args, kwargs, inputs)
        known = self._run_bookkeeping(func, args, kwargs, inputs)
        if known is not None:
            return known
        result = func(*args, **kwargs)
        self.note(func, args, kwargs, result, inputs)
        self._compute_values(func, args, kwargs, result, inputs)
        return result

    def from_values(self, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return a fake that knows its values."""
        fake = aten.empty.memory_format(list(values.shape), dtype=values.dtype, device=device)
        setattr(fake, _KNOWN, values)
        self.count_tensors([fake])
        return cast(torch.Tensor, fake)

    def answer(self, rule: str) -> None:
        """Note that a rule stands in for what a fake cannot know or another rank would say."""
        self.questions[rule, running_line(2)] += 1

    def _as_fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a fake that shares the values of a real tensor, if it is small."""
        if isinstance(tensor, FakeTensor):
            return tensor
        fake: torch.Tensor = self.fakes.from_tensor(tensor, static_shapes=True)
        if _is_small(tensor) and tensor.device.type == "cpu":
            setattr(fake, _KNOWN, tensor)
        return fake

    # -- operators ------------------------------------------------------------------------------------------------

    def _run_bookkeeping(
        self, func: Operator, args: Sequence[object], kwargs: Mapping[str, object], inputs: Sequence[torch.Tensor]
    ) -> torch.Tensor | None:
        """Run an operator of few known values on these alone: torch's fakes take several times as long.

        Returns:
            The result; None: fakes must give it, since values are not known, or are views or refused.
        """
        name, returned = func._schema.name.partition("::")[2], func._schema.returns
        is_writing = func._schema.is_mutable
        if not inputs or len(returned) != 1 or func._overloadpacket in flop_registry:
            return None
        if name in _NO_BOOKKEEPING or is_writing is not name.endswith("_"):
            return None
        if not is_writing and returned[0].alias_info is not None:
            return None  # a view, whose storage the fake must share
        device = cast(FakeTensor, inputs[0]).fake_device
        for tensor in inputs:
            # Tensors on two devices are torch's to judge.
            is_elsewhere = cast(FakeTensor, tensor).fake_device != device and func is not aten.copy_.default
            if is_elsewhere or tensor.numel() > _MOST_BOOKKEEPING or not _has_values(tensor):
                return None
        try:
            values = self._run_on_values(func, args, kwargs)
        except (RuntimeError, NotImplementedError, TypeError, IndexError):
            return None
        if is_writing:
            return inputs[0]
        if not isinstance(values, torch.Tensor) or not _is_small(values):
            return None
        with torch._C._DisableTorchDispatch():
            shape = aten.empty_strided.default(values.shape, values.stride(), dtype=values.dtype, device="meta")
        fake = FakeTensor(self.fakes, shape, cast(torch.device, kwargs.get("device")) or device)
        setattr(fake, _KNOWN, values)
        self.count_tensors([fake], inputs)
        return fake

    def _compute_values(
        self,
        func: Operator,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        result: object,
        inputs: Sequence[torch.Tensor],
    ) -> None:
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, FakeTensor)]
        for fake in made:
            fake.constant = None  # torch would move it to the device, which does not exist
        is_known = all(_has_values(tensor) for tensor in inputs)
        if func._schema.is_mutable and not is_known:
            self._spoil(made, inputs)
            return
        name = func._schema.name.partition("::")[2]
        if not made or not is_known or not all(_is_small(fake) for fake in made):
            return
        if not inputs and name not in _FACTORIES:
            return
        try:
            values = self._run_on_values(func, args, kwargs)
        except (RuntimeError, NotImplementedError, TypeError):
            self.unsupported[str(func)] += 1
            return
        if not func._schema.is_mutable:
            for fake, value in zip(tree_leaves(result), tree_leaves(values), strict=True):
                if isinstance(fake, FakeTensor):
                    setattr(fake, _KNOWN, value)

    def _spoil(self, targets: Sequence[FakeTensor], inputs: Sequence[torch.Tensor]) -> None:
        """Forget values over which unknown ones were written; where that is a part of a tensor, zeros stand in."""
        written = {id(tensor) for tensor in inputs}
        for target in targets:
            values = values_of(target)
            if id(target) not in written or values is None:
                continue
            storage = values.untyped_storage()
            if values.dtype.is_floating_point and values.nbytes == storage.nbytes():
                storage.is_spoiled = True  # type: ignore[attr-defined]  # seen by all views
                continue
            with torch._C._DisableTorchDispatch():
                values.zero_()
            self.answer("unknown numbers written into known ones: zeros")

    def _run_on_values(self, func: Operator, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        plain_args = tree_map(_plain, args)
        plain_kwargs = {name: tree_map(_plain, value) for name, value in kwargs.items() if name != "pin_memory"}
        if plain_kwargs.get("device") is not None:
            plain_kwargs["device"] = torch.device("cpu")
        with torch._C._DisableTorchDispatch():
            values = func(*plain_args, **plain_kwargs)
            if "empty" in func._schema.name:
                # Whatever lay in the memory would pass for a known number.
                cast(torch.Tensor, values).zero_()
        return values

    def _indices_of_masks(self, indices: Sequence[object]) -> list[object]:
        """Replace masks among the indices of a tensor by the places that they select."""
        result: list[object] = []
        for index in indices:
            if not _is_mask(index):
                result.append(index)
                continue
            mask = cast(torch.Tensor, index)
            values = values_of(mask)
            if values is None:
                raise UnknownValues(f"a mask of unknown values selects elements at {running_line()}")
            with torch._C._DisableTorchDispatch():
                places = values.nonzero(as_tuple=True)
            result += [self.from_values(place, mask.device) for place in places]
        return result

    def _run_dynamic(
        self, func: Operator, args: Sequence[object], kwargs: Mapping[str, object], inputs: Sequence[torch.Tensor]
    ) -> object:
        if not all(_has_values(tensor) for tensor in inputs):
            raise UnknownValues(f"{func} of unknown values at {running_line()}")
        device = inputs[0].device
        values = self._run_on_values(func, args, kwargs)
        return tree_map_only(torch.Tensor, lambda value: self.from_values(value, device), values)

    def _ask(self, func: Operator, args: Sequence[object]) -> object:
        tensors = [leaf for leaf in args if isinstance(leaf, torch.Tensor)]
        function = running_line(1).rpartition(" ")[2]
        if function in DIFFERENCES:
            # Also where numbers seem to be known: kernels that exist on a GPU alone have left zeros.
            self.answer("the difference of two ways to compute the same: 0")
            return 0.0
        if all(_has_values(tensor) for tensor in tensors):
            return self._run_on_values(func, args, {})
        if func is aten.equal.default:
            self.answer("are tensors equal: yes")
            return True
        return self.constant_for(tensors[0].dtype)

    def constant_for(self, dtype: torch.dtype) -> Number:
        """Answer for the value of an unknown number."""
        if dtype is torch.bool:
            self.answer("an unknown condition: true")
            return True
        # Not 0: of metrics as sum and count, those without a count are left out.
        self.answer("an unknown number: 1")
        return 1.0 if dtype.is_floating_point else 1

    # -- collectives ----------------------------------------------------------------------------------------------

    def _communicate(self, func: Operator, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        call = self.note_collective(func, args, kwargs)
        if self.hides_device:
            _check_backend(call, args)
        if call.kind in ("broadcast_", "recv_") and self.incoming is not None:
            self._receive(call, cast(Sequence[torch.Tensor], args[0])[0])
        work = FakeWork()
        boxed = work.boxed() if hasattr(work, "boxed") else work
        # What other ranks would have sent is not known, so the tensors stay as they are.
        return boxed if len(func._schema.returns) == 1 else (args[0], boxed)

    def _receive(self, call: Collective, target: torch.Tensor) -> None:
        assert self.incoming is not None
        sent, values = self.incoming(call, target), values_of(target)
        if sent is not None and values is not None:
            with torch._C._DisableTorchDispatch():
                values.copy_(sent)


def _check_devices(func: Operator, inputs: Sequence[torch.Tensor]) -> None:
    """Refuse tensors on two devices as torch refuses those with memory.

    Raises:
        RuntimeError: a tensor is elsewhere than the first one.
    """
    here = inputs[0].device
    for tensor in inputs[1:]:
        # Indices of the host are copied to a tensor of the GPU, and numbers of the host join it.
        joins = tensor.device.type == "cpu" and (func in _INDEXING or tensor.dim() == 0)
        if tensor.device != here and not joins:
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, but found {here} and {tensor.device}"
            )


def _check_backend(call: Collective, args: Sequence[object]) -> None:
    """Refuse tensors of the host in a group of GPUs.

    Raises:
        RuntimeError: NCCL would send a tensor of the host.
    """
    host = next((tensor for tensor in tensors_in(args) if tensor.device.type == "cpu"), None)
    # That of a barrier is made by torch, on the device of the group.
    if host is None or call.kind == "barrier":
        return
    if dist.get_backend(group_in(args)) == "nccl":
        raise RuntimeError(
            f"{call.kind} of a tensor of the host ({call.dtype} {list(host.shape)}) in a group of {len(call.ranks)} "
            "ranks over NCCL, which sends those of GPUs alone"
        )


def values_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the values of a fake, or a real tensor itself; None: they are not known."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    values: torch.Tensor | None = getattr(tensor, _KNOWN, None)
    # `tensor.data = other` changes a tensor without an operator.
    if values is None or values.shape != tensor.shape or hasattr(values.untyped_storage(), "is_spoiled"):
        return None
    return values


def set_values(tensor: torch.Tensor, values: torch.Tensor | None) -> None:
    """Let a fake know values, or forget them."""
    setattr(tensor, _KNOWN, values)


def _has_values(tensor: torch.Tensor) -> bool:
    return values_of(tensor) is not None


def _is_small(tensor: torch.Tensor) -> bool:
    return tensor.numel() <= (_MOST_KNOWN_FLOATS if tensor.dtype.is_floating_point else _MOST_KNOWN_INTEGERS)


def _is_mask(index: object) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _plain(leaf: object) -> object:
    return values_of(leaf) if isinstance(leaf, FakeTensor) else leaf
