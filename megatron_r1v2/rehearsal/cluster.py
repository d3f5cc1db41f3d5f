"""One rank of a cluster in this process: torch's fake process group, and rules for what the other ranks would say.

The rule for objects: the others say what this rank says. Where that is wrong, because the others hold other things or
this rank has nothing to say, `OTHERS_SAY_NOTHING` and `stand_ins.py` have rules of their own. Every answer is noted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_r1v2.parallel import groups, objects
from megatron_r1v2.rehearsal.collectives import Collective
from megatron_r1v2.rehearsal.fake_tensors import FakeTensors
from megatron_r1v2.rehearsal.watch import Watch, original, replace, unwatched

Item = TypeVar("Item")
Function = Callable[..., object]

OTHERS_SAY_NOTHING = frozenset(
    {"_gather_responses", "respond", "_gather", "compute_mismatch", "combine", "_compute_digests", "settle", "_forward"}
)
"""Functions that gather what each rank has of its own: this rank stands for all, so the others have none of it."""


@dataclass(frozen=True)
class Place:
    """The number of a rank in the world."""

    rank: int
    world_size: int
    ranks_per_node: int

    def enter(self) -> None:
        """Give this process the environment of the rank."""
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK="0",  # whichever GPU of its node it has: the only one of this process
            LOCAL_WORLD_SIZE=str(min(self.ranks_per_node, self.world_size)),
        )


def install_fake_groups(mode: FakeTensors) -> None:
    """Let torch.distributed start groups without other processes, and rules answer for these."""
    # Importing it registers the backend "fake".
    import torch.testing._internal.distributed.fake_pg  # noqa: F401

    backends: dict[object, str] = {}
    start, new_group = dist.init_process_group, dist.new_group

    def init_process_group(**kwargs: object) -> None:
        kwargs.pop("backend", None)  # always the fake one
        start("fake", **{**kwargs, "store": dist.HashStore()})  # type: ignore[attr-defined, arg-type]

    def make_group(ranks: Sequence[int] | None = None, *_: object, **kwargs: object) -> object:
        group = new_group(list(ranks) if ranks is not None else None, backend="fake")
        backends[group] = str(kwargs.get("backend") or "nccl")
        return group

    _replace(dist, "init_process_group", init_process_group)
    _replace(dist, "new_group", make_group)
    # Asked by what needs NCCL. The world's group, of which nothing is noted, is NCCL's too.
    _replace(dist, "get_backend", lambda group=None: backends.get(group, "nccl"))
    _replace(dist, "all_gather_object", _answer_gather(mode))
    _replace(dist, "broadcast_object_list", _answer_broadcast(mode))
    replace(objects, "exchange", _answer_exchange(mode))
    replace(groups, "GroupStore", _LonelyStore)


def note_object_collectives(watch: Watch) -> None:
    """Note each collective of objects, and of a checkpoint's files, as one call: their sizes are no matter of code."""
    for name in ("save", "load"):
        replace(dist_checkpointing, name, _noted(watch, f"checkpoint_{name}", original(dist_checkpointing, name)))
    for name in ("all_gather_object", "broadcast_object_list"):
        _replace(dist, name, _noted(watch, name, getattr(dist, name)))
    replace(objects, "exchange", _noted(watch, "exchange", original(objects, "exchange")))


def caller_outside(*modules: str) -> str:
    """Return the name of the innermost function of the package that is not in these modules, nor in rehearsal/."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith("megatron_r1v2.") and ".rehearsal." not in name and not name.endswith(modules):
            return frame.f_code.co_name
    return ""


def _noted(watch: Watch, name: str, collective: Function) -> Function:
    def call(*args: object, **kwargs: object) -> object:
        group = kwargs.get("group") or next((arg for arg in args if isinstance(arg, dist.ProcessGroup)), None)
        ranks = tuple(dist.get_process_group_ranks(group if isinstance(group, dist.ProcessGroup) else None))
        noted = Collective(f"object:{name}", ranks, "", 0, 0, phase=watch.ledger.current_phase)
        with watch.collectives.as_one(noted):
            return collective(*args, **kwargs)

    return call


def _answer_gather(mode: FakeTensors) -> Function:
    def all_gather_object(into: list[object], item: object, group: dist.ProcessGroup | None = None) -> None:
        me = dist.get_rank(group)
        if len(into) == 1:
            into[0] = item
            return
        name = caller_outside(".objects")
        says_nothing = name in OTHERS_SAY_NOTHING
        mode.answer(f"the other ranks in {name}: {'nothing' if says_nothing else 'the same as this one'}")
        for rank in range(len(into)):
            into[rank] = _nothing_like(item) if says_nothing and rank != me else item

    return all_gather_object


def _nothing_like(item: object) -> object:
    """Return an empty object of the same type, also within a tuple."""
    return tuple(_nothing_like(part) for part in item) if isinstance(item, tuple) else type(item)()


def _answer_broadcast(mode: FakeTensors) -> Function:
    def broadcast_object_list(_: list[object], src: int = 0, **__: object) -> None:
        if dist.get_rank() != src:
            mode.answer(f"the first rank in {caller_outside('.objects')}: the same as this one")

    return broadcast_object_list


def _answer_exchange(mode: FakeTensors) -> Function:
    def exchange(outgoing: Sequence[Item], group: dist.ProcessGroup, _: torch.device) -> list[Item]:
        me = dist.get_rank(group)
        if len(outgoing) == 1:
            return list(outgoing)
        mode.answer("what other replicas send this one to train: see send_to_trainers")
        with unwatched():
            return [
                outgoing[me] if rank == me else _nothing_like(outgoing[me])  # type: ignore[misc]
                for rank in range(len(outgoing))
            ]

    return exchange


class _LonelyStore:
    """The store of the process groups where no other rank writes: all that is waited for is there."""

    def __init__(self, _: object = None) -> None:
        self._values: dict[str, str] = {}
        self.timeout = timedelta(seconds=1)

    def set(self, key: str, value: str) -> None:
        """Write a value."""
        self._values[key] = value

    def get(self, key: str) -> str:
        """Return a value."""
        return self._values[key]

    def add(self, key: str, amount: int) -> int:
        """Add to a counter and return it."""
        count = int(self._values.get(key, "0")) + amount
        self._values[key] = str(count)
        return count

    def has(self, keys: Sequence[str]) -> bool:
        """Return whether all of these are written: the other ranks have arrived wherever this one is."""
        return all(key in self._values or _is_arrival(key) for key in keys)


def _is_arrival(key: str) -> bool:
    """Return whether a key says that a rank has come to a place, as `RankWatch.wait_for_all` writes them."""
    return key.startswith("watch/") and key.count("/") == 2


def _replace(module: object, name: str, function: Function) -> None:
    """Replace a function of torch.distributed under both of its names."""
    replace(module, name, function)
    replace(dist.distributed_c10d, name, function)
