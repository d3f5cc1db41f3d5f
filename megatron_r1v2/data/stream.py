"""The endless shuffled stream of prompts for training, and one pass in a fixed order for everything else.

Every rank reads the same global stream (energon sees one rank without workers) and takes its part by index. So the
order depends on the seed only, and a run may be resumed in another layout.
"""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar, final

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
from megatron_r1v2.data.samples import DataError, SampleError
from megatron_r1v2.data.shards import SPLIT, check_shards
from megatron_r1v2.resilience.fingerprint import Fingerprint
from megatron_r1v2.types import Prompt

# Tar files held open at once; in shuffled order the next sample may be in any of them.
_OPEN_SHARDS = 16
# Before this many samples (or all, if they are fewer) the part of corrupt ones is no estimate of the whole.
_JUDGE_AFTER = 100
_CORRUPT_KEPT = 20
_STATE_VERSION = 1

Item = TypeVar("Item")
RawSample = Mapping[str, object]
"""A sample as energon reads it: "__key__", and the contents of its files by name."""
BuildPrompt = Callable[[str, Mapping[str, bytes]], Prompt | None]


class TallyState(TypedDict):
    """The counts of a stream in a checkpoint."""

    read: int
    corrupt: int
    bad_in_a_row: int
    last_error: str
    keys: list[str]
    left_out: NotRequired[int]  # not in older checkpoints


@final
class StreamState(TypedDict):
    """The position of a stream in a checkpoint."""

    version: int
    shards: dict[str, int]
    seed: int
    shuffle: bool
    loader: bytes
    tally: TallyState
    order: NotRequired[int]  # not in older checkpoints


class SourceState(TypedDict):
    """The position in one data set of a mixture."""

    name: str
    weight: float
    drawn: int
    stream: StreamState


@final
class MixtureState(TypedDict):
    """The position of a mixture in a checkpoint."""

    sources: list[SourceState]


class PromptStream:
    """An endless stream of prompts, in a new order every epoch, with each sample once in an epoch.

    Without `settings.shuffle` the order is that of the shards; with it each epoch is a permutation of the whole data
    set, drawn from the seed. No sample is held in memory for that: shards are read at random places.

    Args:
        folder: a folder of `r1v2 prepare`.
        build: makes a prompt from a key and the files of its sample, `PromptBuilder.build`; None leaves it out.

    Raises:
        ValueError: the data set is incomplete.
    """

    def __init__(self, folder: str | Path, build: BuildPrompt, *, settings: DataConfig, seed: int) -> None:
        self._folder = Path(folder)
        self._shards = check_shards(folder)
        self._seed = seed
        self._shuffle = settings.shuffle
        self._build = build
        self._order = 0
        self._loader = self._new_loader()
        self._tally = _Tally(self._folder, settings.max_corrupt_fraction, len(self._loader))
        self._iterator: Iterator[RawSample] | None = None

    @property
    def num_distinct(self) -> int:
        """Return the number of distinct prompts, which is the size of the data set."""
        return sum(self._shards.values())

    @property
    def samples_read(self) -> int:
        """Return the number of samples read since the start of training, corrupt ones included."""
        return self._tally.read

    @property
    def corrupt(self) -> int:
        """Return the number of corrupt samples among them; a sample counts again in every epoch."""
        return self._tally.corrupt

    @property
    def left_out(self) -> int:
        """Return the number of samples left out as too long (data.too_long=skip); it counts again in every epoch."""
        return self._tally.left_out

    def next(self, count: int) -> list[Prompt]:
        """Read the next `count` prompts, skipping corrupt samples.

        Raises:
            DataError: too many samples are corrupt, or a prompt is too long.
            ValueError: a shard cannot be read.
        """
        prompts: list[Prompt] = []
        # Not before the first call: energon restores a position only into a loader that has not started.
        if self._iterator is None:
            self._iterator = iter(self._loader)
        while len(prompts) < count:
            prompt = _read_one(self._iterator, self._build, self._tally, self._folder)
            if prompt is not None:
                prompts.append(prompt)
        return prompts

    def state_dict(self) -> StreamState:
        """Return the position of the stream."""
        # Energon's state is pickled to bytes, so that torch.load(weights_only=True) accepts the checkpoint.
        return {
            "version": _STATE_VERSION,
            "shards": dict(self._shards),
            "seed": self._seed,
            "shuffle": self._shuffle,
            "loader": pickle.dumps(self._loader.save_state_rank()),
            "tally": self._tally.state_dict(),
            "order": self._order,
        }

    def load_state_dict(self, state: StreamState | MixtureState) -> str | None:
        """Continue at the position of a `state_dict`, in this or another process.

        Where samples were taken out of the data set since, the position means nothing any more: a new order begins.

        Returns:
            What there is to say about samples that were taken out; None: there are none.

        Raises:
            ValueError: the position is of other shards, another seed or another order.
        """
        if "sources" in state:
            raise ValueError(
                f"the saved data position cannot be used: data.train was {listed_sources(state)} when it was saved and "
                f"is {self._folder} now; put it back, or start a new run"
            )
        fewer = _is_reduced(self._shards, state["shards"])
        here = self.state_dict()
        if fewer:
            here["shards"] = state["shards"]
        for change in _fingerprint(here).changes_since(_fingerprint(state)):
            raise ValueError(
                f"the saved data position cannot be used with {self._folder}: {change.setting} was {change.old!r} "
                f"when it was saved and is {change.new!r} now; put it back, or start a new run"
            )
        self._tally.load_state_dict(state["tally"])
        # Never the order of an epoch that was begun before: its first samples would be trained twice as often.
        self._order = self._tally.read if fewer else state.get("order", 0)
        # Energon restores a loader only before its first sample.
        self._loader, self._iterator = self._new_loader(), None
        if not fewer:
            self._loader.restore_state_rank(pickle.loads(state["loader"]))
            return None
        if not self._shuffle:
            self._iterator = iter(self._loader)
            for _ in range(self._tally.read % len(self._loader)):
                next(self._iterator)
        before, now = sum(state["shards"].values()), sum(self._shards.values())
        return (
            f"{self._folder} has {now} samples, and had {before} when the run was saved: it goes on with "
            f"{'a new order of them' if self._shuffle else 'them where it was, give or take those taken out'}"
        )

    def _new_loader(self) -> SavableDataLoader:
        return _loader(self._folder, shuffle=self._shuffle, repeat=True, seed=self._seed + self._order)


def listed_sources(state: StreamState | MixtureState) -> str:
    """Return the data sets of a position with their weights, for people."""
    if "sources" not in state:
        return "one data set"
    return ", ".join(f"{source['name']} x {source['weight']:g}" for source in state["sources"])


def _is_reduced(shards: Mapping[str, int], before: Mapping[str, int]) -> bool:
    """Return whether shards are those of before less some samples: not another data set, of which less is the same."""
    fewer = all(count <= before.get(name, 0) for name, count in shards.items())
    return shards != before and fewer and 2 * sum(shards.values()) >= sum(before.values())


def _fingerprint(state: StreamState) -> Fingerprint:
    """Return the settings that a position depends on."""
    return Fingerprint.of(
        version=state["version"],
        # As a list: all shards are one setting, of which a message shows both values.
        shards=sorted(state["shards"].items()),
        run={"seed": state["seed"]},
        data={"shuffle": state["shuffle"]},
    )


def read_shards(
    folder: str | Path,
    build: Callable[[str, Mapping[str, bytes]], Item | None],
    *,
    max_corrupt_fraction: float = 1.0,
    count: int = 0,
) -> Iterator[Item]:
    """Read a data set once in the order of its shards, one item at a time.

    Args:
        folder: a folder of `r1v2 prepare`.
        build: makes an item from a key and the files of its sample: `PromptBuilder.build` for the prompts of a model,
            or `parse_sample` for the samples themselves; None leaves a sample out.
        count: the number of items, from the start; 0: all.

    Yields:
        The items, without those of corrupt samples.

    Raises:
        ValueError: the data set is incomplete, has too many corrupt samples or fewer than `count` good ones, or `build`
            raises a ValueError that is not a SampleError.
    """
    root = Path(folder)
    check_shards(root)
    loader = _loader(root, shuffle=False, repeat=False, seed=0)
    tally = _Tally(root, max_corrupt_fraction, len(loader))
    iterator = iter(loader)
    usable = 0
    for _ in range(len(loader)):
        item = _read_one(iterator, build, tally, root)
        if item is None:
            continue
        yield item
        usable += 1
        if usable == count:
            return
    if usable < count:
        raise ValueError(f"{folder} has {usable} usable samples, {count} were asked for; lower evaluation.prompts")


def _loader(folder: Path, *, shuffle: bool, repeat: bool, seed: int) -> SavableDataLoader:
    """Build energon's reader of raw bytes."""
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
        # Energon shuffles slices of shards; with slices of one sample, an epoch is a permutation of the samples.
        max_samples_per_sequence=1 if shuffle else None,
        decoder=None,
    )
    dataset: SavableDataset[Any] = factory.build()
    if repeat:
        dataset = RepeatDataset(dataset, worker_config=worker_config)
    # With more than 0 steps, energon freezes the garbage collector of this process.
    loader = get_savable_loader(dataset, gc_collect_every_n_steps=0, watchdog_timeout_seconds=None)
    # Without this, torch's loader draws a number from the global generator at each start, and a resumed run once more.
    loader.generator = torch.Generator().manual_seed(seed)
    return loader


def _read_one(
    iterator: Iterator[RawSample],
    build: Callable[[str, Mapping[str, bytes]], Item | None],
    tally: _Tally,
    folder: Path,
) -> Item | None:
    """Read one sample and return its item, or None if it is corrupt or left out."""
    try:
        raw = next(iterator)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"{folder}: a shard cannot be read ({error}); copy the data set again") from error
    parts = {name: data for name, data in raw.items() if isinstance(data, bytes)}
    key = str(raw["__key__"])
    try:
        item = build(key, parts)
    except SampleError as error:
        tally.add_corrupt(key, str(error))
        return None
    if item is None:
        tally.add_left_out()
    else:
        tally.add_good()
    return item


class _Tally:
    """A count of samples that stops the run when too many are corrupt."""

    def __init__(self, folder: Path, max_fraction: float, size: int) -> None:
        self._folder = folder
        self._max_fraction = max_fraction
        self._size = size
        self._bad_in_a_row = 0
        self._last_error = ""
        self.read = 0
        self.corrupt = 0
        self.left_out = 0
        self.keys: list[str] = []

    def add_good(self) -> None:
        """Count a usable sample."""
        self.read += 1
        self._bad_in_a_row = 0
        self._judge()

    def add_left_out(self) -> None:
        """Count a sample that is too long."""
        self.read += 1
        self.left_out += 1
        self._bad_in_a_row += 1
        self._judge()

    def add_corrupt(self, key: str, error: str) -> None:
        """Count a corrupt sample, and keep its key and its error."""
        self.read += 1
        self.corrupt += 1
        self._bad_in_a_row += 1
        self._last_error = error
        if key not in self.keys and len(self.keys) < _CORRUPT_KEPT:
            self.keys.append(key)
        self._judge()

    def state_dict(self) -> TallyState:
        """Return the counts."""
        return {
            "read": self.read,
            "corrupt": self.corrupt,
            "bad_in_a_row": self._bad_in_a_row,
            "last_error": self._last_error,
            "keys": list(self.keys),
            "left_out": self.left_out,
        }

    def load_state_dict(self, state: TallyState) -> None:
        """Continue from the counts of a `state_dict`."""
        self.read, self.corrupt = state["read"], state["corrupt"]
        self._bad_in_a_row, self._last_error = state["bad_in_a_row"], state["last_error"]
        self.keys, self.left_out = list(state["keys"]), state.get("left_out", 0)

    def _judge(self) -> None:
        # A whole data set without a usable sample would let the stream read for ever.
        nothing_usable = self._bad_in_a_row >= self._size
        if nothing_usable and self.left_out:
            raise DataError(
                f"{self._folder}: none of the {self._size} samples can be used: of {self.read} read, {self.left_out} "
                f"are longer than data.max_prompt_tokens and left out, {self.corrupt} are corrupt; raise "
                "data.max_prompt_tokens, or set data.too_long=fewer_tiles"
            )
        too_many = self.read >= min(_JUDGE_AFTER, self._size) and self.corrupt > self._max_fraction * self.read
        if too_many or nothing_usable:
            raise DataError(
                f"{self._folder}: {self.corrupt} of {self.read} samples read are corrupt, more than "
                f"data.max_corrupt_fraction = {self._max_fraction} allows; first keys: {', '.join(self.keys)}; "
                f"last error: {self._last_error}. Repair the data set, or raise the setting to skip them"
            )
