"""Prompts that are too long for a run, found in the shards before it: their text and the heads of their images."""

from __future__ import annotations

import itertools
import tarfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from megatron_r1v2.config.choices import TooLong
from megatron_r1v2.config.schema import DataConfig
from megatron_r1v2.data.images import image_size, tile_limit
from megatron_r1v2.data.prompts import PromptBuilder, PromptTooLong
from megatron_r1v2.data.samples import SampleError, ShardSample, parse_sample
from megatron_r1v2.data.shards import check_shards

_NAMED = 20


@dataclass(frozen=True)
class LongPrompts:
    """The prompts of a data set that are longer than `data.max_prompt_tokens`."""

    too_long: Mapping[str, str] = field(default_factory=dict)
    """Those that cannot be made to fit, by key, with an error for each."""
    reduced: tuple[str, ...] = ()
    """The keys of those that fit with fewer tiles."""

    def __add__(self, other: LongPrompts) -> LongPrompts:
        return LongPrompts({**self.too_long, **other.too_long}, self.reduced + other.reduced)

    def sentences(self, folder: str, settings: DataConfig) -> list[str]:
        """Return what there is to say about them.

        Raises:
            ValueError: there are prompts that cannot be made to fit, and data.too_long does not skip them.
        """
        if self.too_long and settings.too_long is not TooLong.skip:
            more = f". {len(self.too_long)} prompts of {folder} are too long: {_listed(self.too_long)}"
            raise ValueError(next(iter(self.too_long.values())) + more)
        kinds = {"left out": tuple(self.too_long), "cut into fewer tiles": self.reduced}
        return [
            f"{len(keys)} prompts of {folder} are longer than data.max_prompt_tokens={settings.max_prompt_tokens} and "
            f"are {verb}: {_listed(keys)}"
            for verb, keys in kinds.items()
            if keys
        ]


def find_long_prompts(
    folder: str | Path, builder: PromptBuilder, settings: DataConfig, *, part: int = 0, parts: int = 1
) -> LongPrompts:
    """Measure the prompts of a data set; no pixel is decoded, and a corrupt sample is left to the reader.

    Args:
        part: of the shards: every `parts`-th from here.

    Raises:
        ValueError: the data set is incomplete, or a shard cannot be read.
    """
    too_long, reduced = {}, []
    for name in sorted(check_shards(folder))[part::parts]:
        for sample, sizes in _heads(Path(folder) / name):
            try:
                length = builder.measure(sample.key, sample.messages, sizes)
            except PromptTooLong as error:
                too_long[sample.key] = str(error)
            except SampleError:
                continue
            else:
                if length.max_tiles < tile_limit(settings.max_tiles, max(1, len(sizes))):
                    reduced.append(sample.key)
    return LongPrompts(too_long, tuple(reduced))


def _heads(shard: Path) -> Iterator[tuple[ShardSample, list[tuple[int, int]]]]:
    """Yield each sample that is not corrupt, without the bytes of its images, and their sizes."""
    try:
        with tarfile.open(shard) as tar:
            files: dict[str, dict[str, tarfile.TarInfo]] = defaultdict(dict)
            for member in tar:
                key, _, name = member.name.partition(".")
                files[key][name] = member
            for key, members in files.items():
                try:
                    parts = dict.fromkeys(members, b"")
                    if "json" in members:
                        parts["json"] = _open(tar, members["json"]).read()
                    sample = parse_sample(key, parts)
                    sizes = [image_size(_open(tar, members[name]), f"{key}.{name}") for name in sample.images]
                except SampleError:
                    continue  # counted where it is read for training
                yield sample, sizes
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{shard} cannot be read ({error}); copy the data set again") from error


def _open(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(member)
    if file is None:
        raise SampleError(f"{member.name} is no file")
    return file


def _listed(keys: Collection[str]) -> str:
    first = ", ".join(itertools.islice(keys, _NAMED))
    return f"{first}, ..." if len(keys) > _NAMED else first
