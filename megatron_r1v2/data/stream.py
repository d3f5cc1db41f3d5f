"""The endless shuffled stream of prompts that training reads, and the fixed order that evaluation reads.

Every rank reads the same global stream (energon sees one rank without workers) and takes its part by index, so the
order depends on the seed alone and never on the layout, and it can be resumed under another one.
"""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.energon import (
    CrudeWebdataset,
    RepeatDataset,
    SavableDataLoader,
    SavableDataset,
    WorkerConfig,
    get_savable_loader,
    reraise_exception,
)
from megatron.energon.epathlib import EPath

from megatron_r1v2.config.schema import DataConfig
from megatron_r1v2.data.prompts import PromptBuilder
from megatron_r1v2.data.samples import SampleError
from megatron_r1v2.data.shards import SPLIT, check_shards
from megatron_r1v2.types import Prompt

# Tar files held open at once; in shuffled order the next sample may be in any of them.
_OPEN_SHARDS = 16
# Below this many samples read (or the data set's size, if that is less) a few corrupt ones say nothing of the rest.
_JUDGE_AFTER = 100
_CORRUPT_KEPT = 20
_STATE_VERSION = 1

Item = TypeVar("Item")


class PromptStream:
    """An endless stream of prompts in a new order every epoch, each sample once an epoch.

    `settings.shuffle_buffer` of 0 keeps the order of the shards; with any other value each epoch is a permutation of
    the whole data set, drawn from the seed. No samples are held in memory for it: shards are read at random.

    Args:
        folder: Made by `r1v2 prepare`.
        builder: Makes the prompts.
        settings: The order, and the part of samples that may be corrupt.
        seed: Decides the order.

    Raises:
        ValueError: If the data set is incomplete.
    """

    def __init__(self, folder: str | Path, builder: PromptBuilder, *, settings: DataConfig, seed: int) -> None:
        self._folder = Path(folder)
        self._shards = check_shards(folder)
        self._seed = seed
        self._shuffle = settings.shuffle_buffer > 0
        self._builder = builder
        self._loader = self._new_loader()
        self._tally = _Tally(self._folder, settings.max_corrupt_fraction, len(self._loader))
        self._iterator: Iterator[dict[str, Any]] | None = None

    @property
    def samples_read(self) -> int:
        """Return how many samples were read since the start of training, corrupt ones included."""
        return self._tally.read

    @property
    def corrupt(self) -> int:
        """Return how many of them were corrupt; a sample counts again in every epoch."""
        return self._tally.corrupt

    @property
    def corrupt_keys(self) -> tuple[str, ...]:
        """Return the keys of the first few corrupt samples."""
        return tuple(self._tally.keys)

    def next(self, count: int) -> list[Prompt]:
        """Read the next prompts, skipping corrupt samples.

        Args:
            count: How many.

        Returns:
            That many prompts.

        Raises:
            ValueError: If too many samples are corrupt, a prompt is too long, or a shard cannot be read.
        """
        prompts: list[Prompt] = []
        if self._iterator is None:
            self._iterator = iter(self._loader)
        while len(prompts) < count:
            prompt = _read_one(self._iterator, self._builder.build, self._tally, self._folder)
            if prompt is not None:
                prompts.append(prompt)
        return prompts

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands.

        Returns:
            Plain values and bytes only: goes through torch.save, torch.load(weights_only=True) and pickle.
        """
        return {
            "version": _STATE_VERSION,
            "shards": dict(self._shards),
            "seed": self._seed,
            "shuffle": self._shuffle,
            "loader": pickle.dumps(self._loader.save_state_rank()),
            "tally": self._tally.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken, in this or another process.

        Args:
            state: From `state_dict`.

        Raises:
            ValueError: If it is of other shards, another seed or another order.
        """
        here = {"version": _STATE_VERSION, "shards": self._shards, "seed": self._seed, "shuffle": self._shuffle}
        settings = {"seed": "run.seed", "shuffle": "data.shuffle_buffer > 0"}
        for name, value in here.items():
            if state[name] != value:
                raise ValueError(
                    f"the saved data position cannot be used with {self._folder}: {settings.get(name, name)} was "
                    f"{state[name]!r} when it was saved and is {value!r} now; put it back, or start a new run"
                )
        # Energon restores a loader only before its first sample.
        self._loader, self._iterator = self._new_loader(), None
        self._loader.restore_state_rank(pickle.loads(state["loader"]))
        self._tally.load_state_dict(state["tally"])

    def _new_loader(self) -> SavableDataLoader:
        return _loader(self._folder, shuffle=self._shuffle, repeat=True, seed=self._seed)


def read_shards(
    folder: str | Path,
    build: Callable[[str, Mapping[str, bytes]], Item],
    *,
    max_corrupt_fraction: float = 1.0,
    count: int = 0,
) -> Iterator[Item]:
    """Read a data set once in the order of its shards, an item at a time: it need not fit in memory.

    Args:
        folder: Made by `r1v2 prepare`.
        build: Makes an item of a key and the files of its sample: `PromptBuilder.build` for a model, or `parse_sample`
            for what the shards hold, images undecoded.
        max_corrupt_fraction: Part of the samples that may be corrupt.
        count: How many items, from the start; 0: all.

    Yields:
        The items, without those of corrupt samples.

    Raises:
        ValueError: If the data set is incomplete, has too many corrupt samples or fewer than `count` good ones, or if
            `build` refuses a sample for good.
    """
    root = Path(folder)
    check_shards(root)
    loader = _loader(root, shuffle=False, repeat=False, seed=0)
    tally = _Tally(root, max_corrupt_fraction, len(loader))
    iterator = iter(loader)
    found = 0
    for _ in range(len(loader)):
        item = _read_one(iterator, build, tally, root)
        if item is None:
            continue
        yield item
        found += 1
        if found == count:
            return
    if found < count:
        raise ValueError(f"{folder} has {found} usable samples, {count} were asked for; lower evaluation.prompts")


def _loader(folder: Path, *, shuffle: bool, repeat: bool, seed: int) -> SavableDataLoader:
    """Build energon's reader of raw bytes: slices of one sample, so that shuffling slices permutes the samples."""
    worker_config = WorkerConfig(
        rank=0, world_size=1, num_workers=0, seed_offset=seed, global_error_handler=reraise_exception
    )
    factory = CrudeWebdataset(
        EPath(str(folder.absolute())),
        split_part=SPLIT,
        training=True,
        worker_config=worker_config,
        shuffle_over_epochs=1 if shuffle else None,
        parallel_shard_iters=_OPEN_SHARDS if shuffle else 1,
        max_samples_per_sequence=1 if shuffle else None,
        decoder=None,
    )
    dataset: SavableDataset[Any] = factory.build()
    if repeat:
        dataset = RepeatDataset(dataset, worker_config=worker_config)
    # gc: with more than 0 steps energon freezes the garbage collector of this process.
    loader = get_savable_loader(dataset, gc_collect_every_n_steps=0, watchdog_timeout_seconds=None)
    # A torch loader draws a number from the global generator whenever it starts; a resumed run would draw once more.
    loader.generator = torch.Generator().manual_seed(seed)
    return loader


def _read_one(
    iterator: Iterator[dict[str, Any]],
    build: Callable[[str, Mapping[str, bytes]], Item],
    tally: _Tally,
    folder: Path,
) -> Item | None:
    """Read one sample; None if it is corrupt."""
    try:
        raw = next(iterator)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"{folder}: a shard cannot be read ({error}); copy the data set again") from error
    parts = {name: data for name, data in raw.items() if isinstance(data, bytes)}
    try:
        item = build(raw["__key__"], parts)
    except SampleError as error:
        tally.add_corrupt(raw["__key__"], str(error))
        return None
    tally.add_good()
    return item


class _Tally:
    """Counts samples and stops the run when too many are corrupt."""

    def __init__(self, folder: Path, max_fraction: float, size: int) -> None:
        self._folder = folder
        self._max_fraction = max_fraction
        self._size = size
        self._bad_in_a_row = 0
        self._last_error = ""
        self.read = 0
        self.corrupt = 0
        self.keys: list[str] = []

    def add_good(self) -> None:
        """Count a usable sample."""
        self.read += 1
        self._bad_in_a_row = 0
        self._judge()

    def add_corrupt(self, key: str, error: str) -> None:
        """Count a corrupt sample and remember its key and what was wrong."""
        self.read += 1
        self.corrupt += 1
        self._bad_in_a_row += 1
        self._last_error = error
        if key not in self.keys and len(self.keys) < _CORRUPT_KEPT:
            self.keys.append(key)
        self._judge()

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {
            "read": self.read,
            "corrupt": self.corrupt,
            "bad_in_a_row": self._bad_in_a_row,
            "last_error": self._last_error,
            "keys": list(self.keys),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over counts from `state_dict`."""
        self.read, self.corrupt = state["read"], state["corrupt"]
        self._bad_in_a_row, self._last_error = state["bad_in_a_row"], state["last_error"]
        self.keys = list(state["keys"])

    def _judge(self) -> None:
        too_many = self.read >= min(_JUDGE_AFTER, self._size) and self.corrupt > self._max_fraction * self.read
        if too_many or self._bad_in_a_row >= self._size:  # the latter: nothing usable at all, the stream would hang
            raise ValueError(
                f"{self._folder}: {self.corrupt} of {self.read} samples read are corrupt, more than "
                f"data.max_corrupt_fraction = {self._max_fraction} allows; first keys: {', '.join(self.keys)}; "
                f"last error: {self._last_error}. Repair the data set, or raise the setting to skip them"
            )
