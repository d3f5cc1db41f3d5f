"""Folders of WebDataset shards for megatron-energon: written in one piece, checked before use."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.energon import BaseWebdatasetFactory
from webdataset import ShardWriter

from megatron_r1v2.data.samples import SampleError, ShardSample, encode_record
from megatron_r1v2.resilience.files import atomic_folder, write_file

SPLIT = "train"
_META = ".nv-meta"
# For energon's own tools; stream.py builds the same class itself.
_DATASET_YAML = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
_INDEX_ENTRY = struct.Struct("Q")


def write_shards(samples: Iterable[ShardSample], folder: str | Path, samples_per_shard: int = 1000) -> int:
    """Write a data set and return its number of samples; equal samples give equal tar files.

    Args:
        folder: a new folder, which appears when all of it is written.

    Raises:
        ValueError: the folder exists, `samples_per_shard` is below one, or `samples` is empty.
        SampleError: a sample violates the schema, or its key occurred before.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}, accepted is 1 or more")
    with atomic_folder(folder) as unfinished:
        count = fill_shards(unfinished, samples, samples_per_shard)
        if not count:
            raise ValueError(f"no samples to write to {folder}")
    return count


def write_split_shards(
    samples: Iterable[ShardSample],
    folder: str | Path,
    held_out: str | Path,
    share: float,
    samples_per_shard: int = 1000,
) -> tuple[int, int]:
    """Write a data set in two parts, as `write_shards` does one, and return the number of samples in each.

    Args:
        held_out: the folder of what `is_held_out`; it and `folder` appear when all of both is written.

    Raises:
        ValueError: see `write_shards`; or a part is empty.
        SampleError: see `write_shards`.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}, accepted is 1 or more")
    targets = (Path(folder), Path(held_out))
    counts = [0, 0]
    with atomic_folder(targets[0]) as first, atomic_folder(targets[1]) as second:
        with _open_tars(first, samples_per_shard) as write, _open_tars(second, samples_per_shard) as write_held_out:
            for sample in samples:
                part = is_held_out(sample, share)
                (write, write_held_out)[part](sample)
                counts[part] += 1
        for unfinished, target, count in zip((first, second), targets, counts, strict=True):
            if not count:
                raise ValueError(f"no samples to write to {target}: of {sum(counts)}, {counts[1]} are held out")
            _prepare_for_energon(unfinished)
    return counts[0], counts[1]


def is_held_out(sample: ShardSample, share: float) -> bool:
    """Return whether a sample is in the held-out share of its data set.

    The same samples are, whatever their order and however many are added; all questions about the same images together,
    since a model that was trained on one of them knows the image.
    """
    content = [sample.images[name] for name in sorted(sample.images)]
    if not content:
        content = [json.dumps([dict(message) for message in sample.messages], sort_keys=True).encode()]
    digest = hashlib.sha256(b"".join(hashlib.sha256(each).digest() for each in content)).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def fill_shards(folder: Path, samples: Iterable[ShardSample], samples_per_shard: int = 1000) -> int:
    """Write shards and their index into an empty folder, and return the number of samples.

    The caller may add more files to the folder.

    Raises:
        SampleError: a sample violates the schema, or its key occurred before.
    """
    count = _write_tars(samples, folder, samples_per_shard)
    if count:
        _prepare_for_energon(folder)
    return count


def _write_tars(samples: Iterable[ShardSample], folder: Path, samples_per_shard: int) -> int:
    count = 0
    with _open_tars(folder, samples_per_shard) as write:
        for sample in samples:
            write(sample)
            count += 1
    return count


@contextmanager
def _open_tars(folder: Path, samples_per_shard: int) -> Iterator[Callable[[ShardSample], None]]:
    """Give a function that adds a sample to the shards in a folder."""
    seen: set[str] = set()
    # ShardWriter formats the whole path, so a percent sign in a folder's name must be doubled.
    pattern = str(folder).replace("%", "%%") + "/shard-%06d.tar"
    # mtime=0, so that equal samples give equal files. The record is encoded here, since webdataset does not sort keys.
    with ShardWriter(pattern, maxcount=samples_per_shard, encoder=False, mtime=0, verbose=0) as writer:

        def write(sample: ShardSample) -> None:
            if sample.key in seen:
                raise SampleError(f"sample key {sample.key!r} occurs twice; keys must differ")
            seen.add(sample.key)
            writer.write({"__key__": sample.key, "json": encode_record(sample), **sample.images})

        yield write


def _prepare_for_energon(folder: Path) -> None:
    names = sorted(path.name for path in folder.glob("*.tar"))
    # Energon forks. A forked process that collected a process group of ours as garbage would wait for that group's
    # threads, which only this process has, for ever.
    gc.collect()
    # Energon prints each step to the standard output, where the command's own result belongs.
    with contextlib.redirect_stdout(io.StringIO()):
        BaseWebdatasetFactory.prepare_dataset(
            folder, names, split_parts_patterns=[(SPLIT, r".*\.tar")], shuffle_seed=None, workers=1
        )
    write_file(folder / _META / "dataset.yaml", _DATASET_YAML)


def check_shards(folder: str | Path) -> dict[str, int]:
    """Check that a data set is complete on disk, without reading its samples.

    Args:
        folder: a folder of `write_shards` or `energon prepare`.

    Returns:
        The number of samples by shard name, in reading order.

    Raises:
        ValueError: the folder or its index is missing or empty, or a shard is missing or shorter than its index says.
    """
    root = Path(folder)
    info = root / _META / ".info.json"
    if not info.is_file():
        raise ValueError(
            f"{root} is not a prepared data set ({info} is missing); "
            "make one with python -m megatron_r1v2 prepare, or run energon prepare on existing shards"
        )
    try:
        listed = json.loads(info.read_text())["shard_counts"]
        shard_counts = {str(name): int(count) for name, count in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{info} is damaged ({error!r}); run energon prepare on {root} again") from error
    if not any(shard_counts.values()):
        raise ValueError(f"{root} has no samples ({info} lists none); make it again, or run energon prepare on it")
    for name in shard_counts:
        tar, index = root / name, root / f"{name}.idx"
        for path in (tar, index):
            if not path.is_file():
                raise ValueError(f"{path} is missing; copy the data set again or run energon prepare on {root}")
        # A copy that was cut off keeps its index. Comparing sizes finds it at once, not after hours of reading.
        expected, size = _indexed_size(index), tar.stat().st_size
        if size < expected:
            raise ValueError(f"{tar} is truncated: {size} bytes of at least {expected}; copy or make it again")
    return shard_counts


def _indexed_size(index: Path) -> int:
    """Return the end of the last sample of a shard at the time when energon indexed it."""
    raw = index.read_bytes()
    if not raw or len(raw) % _INDEX_ENTRY.size:
        raise ValueError(f"{index} is damaged: {len(raw)} bytes; run energon prepare on {index.parent} again")
    return int(_INDEX_ENTRY.unpack(raw[-_INDEX_ENTRY.size :])[0])
