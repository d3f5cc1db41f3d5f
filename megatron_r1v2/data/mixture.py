"""The training data of a recipe: one stream of prompts from one data set, or from several in given shares."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from megatron_r1v2.config.schema import DataConfig, DataSource
from megatron_r1v2.data.prompts import PromptBuilder
from megatron_r1v2.data.shards import check_shards
from megatron_r1v2.data.stream import MixtureState, PromptStream, StreamState, listed_sources, read_shards
from megatron_r1v2.types import Prompt

Item = TypeVar("Item")
Build = Callable[[str, Mapping[str, bytes]], Item | None]
_SEED_STEP = 7919
"""Between the seeds of two data sets, which would else be read in the same order where they are of one size."""


def source_names(sources: Sequence[DataSource]) -> list[str]:
    """Return a name of its own for each data set: that of its folder, with a number where two have the same."""
    folders = [Path(os.path.abspath(source.path)).name for source in sources]  # a path may end in `..`
    names: list[str] = []
    for place, folder in enumerate(folders):
        number = folders[: place + 1].count(folder)
        # A folder may be called as another one is with its number.
        while (numbered := f"{folder}-{number}") in (*folders, *names):
            number += 1
        names.append(folder if folders.count(folder) == 1 else numbered)
    return names


def num_train_samples(settings: DataConfig) -> int:
    """Return the number of samples of `data.train`."""
    return sum(sum(check_shards(source.path).values()) for source in settings.sources)


def num_in_shares(sizes: Sequence[int], weights: Sequence[float]) -> int:
    """Return the largest number of distinct prompts in which the shares of data sets of these sizes hold."""
    total = sum(weights)
    return int(min(size * total / weight for size, weight in zip(sizes, weights, strict=True)))


def check_shares(settings: DataConfig, count: int) -> None:
    """Refuse a mixture of which a data set has fewer samples than its share of a step, which has each prompt once.

    Raises:
        ValueError: it names the entry.
    """
    total = sum(source.weight for source in settings.sources)
    for place, source in enumerate(settings.sources if len(settings.sources) > 1 else ()):
        samples, share = sum(check_shards(source.path).values()), count * source.weight / total
        if samples < share:
            raise ValueError(
                f"data.train[{place}] ({source.path}) has {samples} samples, but its share of train.prompts_per_step="
                f"{count} is {share:.3g} (weight {source.weight:g} of {total:g}); lower its weight or the prompts, or "
                "give it more data"
            )


def read_train(settings: DataConfig, build: Build[Item], *, max_corrupt_fraction: float = 1.0) -> Iterator[Item]:
    """Read `data.train` once, one data set after the other, with the keys that its stream gives.

    Args:
        build: see `read_shards`.
    """
    for source, name in zip(settings.sources, source_names(settings.sources), strict=True):
        named = with_key(build, name) if len(settings.sources) > 1 else build
        yield from read_shards(source.path, named, max_corrupt_fraction=max_corrupt_fraction)


def with_key(build: Build[Item], name: str) -> Build[Item]:
    """Return a builder that puts the name of the data set before each key: two sets may have the same keys."""
    return lambda key, parts: build(f"{name}:{key}", parts)


def open_train(settings: DataConfig, builder: PromptBuilder, *, seed: int) -> PromptStream | MixtureStream:
    """Return the endless stream of `data.train`.

    Raises:
        ValueError: a data set is incomplete.
    """
    sources = settings.sources
    if len(sources) == 1:
        return PromptStream(sources[0].path, builder.build, settings=settings, seed=seed)
    return MixtureStream(sources, builder, settings=settings, seed=seed)


class MixtureStream:
    """An endless stream of prompts of several data sets, each read as `PromptStream` reads it.

    The next prompt is of the set whose next one is due first (stride scheduling), so the shares hold in every step, to
    a prompt or two, and exactly after a whole round of the weights. Nothing is random: which set comes next depends on
    the numbers read so far alone.
    """

    def __init__(
        self, sources: Sequence[DataSource], builder: PromptBuilder, *, settings: DataConfig, seed: int
    ) -> None:
        self.names = source_names(sources)
        self.weights = [source.weight for source in sources]
        self._drawn = [0] * len(sources)
        self._streams = [
            PromptStream(source.path, with_key(builder.build, name), settings=settings, seed=seed + _SEED_STEP * place)
            for place, (source, name) in enumerate(zip(sources, self.names, strict=True))
        ]

    @property
    def num_distinct(self) -> int:
        """Return the largest number of distinct prompts in which the shares hold; then a data set has no more."""
        return num_in_shares([stream.num_distinct for stream in self._streams], self.weights)

    @property
    def samples_read(self) -> int:
        """Return the number of samples read since the start of training, corrupt ones included."""
        return sum(stream.samples_read for stream in self._streams)

    @property
    def corrupt(self) -> int:
        """Return the number of corrupt samples among them."""
        return sum(stream.corrupt for stream in self._streams)

    @property
    def left_out(self) -> int:
        """Return the number of samples left out as too long."""
        return sum(stream.left_out for stream in self._streams)

    def next(self, count: int) -> list[Prompt]:
        """Read the next `count` prompts, each with the name of its data set.

        Raises:
            DataError: too many samples of a data set are corrupt, or a prompt is too long.
            ValueError: a shard cannot be read.
        """
        prompts = []
        for _ in range(count):
            # The set whose next prompt is due first; of equals the one named first.
            place = min(range(len(self._drawn)), key=lambda place: (self._drawn[place] + 1) / self.weights[place])
            self._drawn[place] += 1
            (prompt,) = self._streams[place].next(1)
            prompts.append(replace(prompt, data_set=self.names[place]))
        return prompts

    def state_dict(self) -> MixtureState:
        """Return the position in every data set."""
        parts = zip(self.names, self.weights, self._drawn, self._streams, strict=True)
        return {
            "sources": [
                {"name": name, "weight": weight, "drawn": drawn, "stream": stream.state_dict()}
                for name, weight, drawn, stream in parts
            ]
        }

    def load_state_dict(self, state: StreamState | MixtureState) -> str | None:
        """Continue at the position of a `state_dict`.

        Returns:
            See `PromptStream.load_state_dict`, for all data sets.

        Raises:
            ValueError: the position is of other data sets or weights.
        """
        saved, here = listed_sources(state), listed_sources(self.state_dict())
        if "sources" not in state or saved != here:
            raise ValueError(
                f"the saved data position cannot be used: data.train was {saved} when it was saved and is {here} now; "
                "put it back, or start a new run"
            )
        self._drawn = [source["drawn"] for source in state["sources"]]
        remarks = [
            stream.load_state_dict(source["stream"])
            for stream, source in zip(self._streams, state["sources"], strict=True)
        ]
        return "; ".join(remark for remark in remarks if remark) or None


def share_metrics(prompts: Sequence[Prompt]) -> dict[str, float]:
    """Return the share of each data set in the prompts of a step; empty where there is one."""
    names = sorted({prompt.data_set for prompt in prompts} - {""})
    return {f"data/share/{name}": sum(each.data_set == name for each in prompts) / len(prompts) for name in names}
