"""A conversion as a list of files: written several at a time beside the output, continued after an interruption.

The output is made as `.NAME.partial` beside it and renamed when everything is on disk. Each finished file has a record
in `.progress/`; a run that finds a partial folder of the same conversion of the same sources goes on with it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, Protocol, TypedDict, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_r1v2.checkpoint.hf.folders import check_output, read_json
from megatron_r1v2.checkpoint.manifest import PROGRESS, TensorEntry
from megatron_r1v2.checkpoint.sources import SourceSpec
from megatron_r1v2.checkpoint.tensor_files import TensorInfo, digest_of, in_threads
from megatron_r1v2.resilience.files import (
    only_writer,
    partial_path,
    publish_folder,
    restore_replaced,
    write_file,
    write_json,
)
from megatron_r1v2.resilience.fingerprint import Fingerprint

# For the files beside the weights and for headers, which are not counted.
_SPARE_BYTES = 64 * 1000**2
# Each holds a tensor in memory: 1.6 GB where it is the embedding of a 38B model.
_WORKERS = min(4, os.cpu_count() or 1)
_BESIDE = f"{PROGRESS}/beside"
_Stamp = tuple[str, int, int]
"""A source file: its path, size, and time of the last change in nanoseconds."""


@dataclass(frozen=True)
class OutputFile:
    """One file of the output."""

    name: str
    parameters: tuple[str, ...]
    """Our names of the parameters in it."""
    tensors: tuple[tuple[str, TensorInfo], ...]
    """Name, shape and dtype of the tensors that are written, in order."""

    @property
    def num_bytes(self) -> int:
        """Return its size, without headers."""
        return sum(info.num_bytes for _, info in self.tensors)


class FileRecord(TypedDict):
    """A finished file."""

    tensors: dict[str, TensorEntry]
    places: NotRequired[dict[str, list[str | int]]]
    """Where each tensor lies, for formats whose files do not say it themselves."""
    file_bytes: NotRequired[int]


@dataclass(frozen=True)
class Conversion(ABC):
    """A source, and the format that its parameters are written in."""

    source: SourceSpec
    folders: tuple[Path, ...]
    """Folders that the source reads: none may be the output."""

    @abstractmethod
    def output_files(self) -> list[OutputFile]:
        """Return the files, the same at every call, after checking everything that can be checked beforehand."""

    @abstractmethod
    def write(self, file: OutputFile, folder: Path, wrote: Callable[[int], None]) -> FileRecord:
        """Write one file and return its record.

        Several are written at a time, each in a thread.

        Args:
            wrote: called with numbers of bytes; raises when the conversion is given up.
        """

    @abstractmethod
    def read_back(self, file: OutputFile, folder: Path, record: FileRecord) -> Iterator[tuple[str, torch.Tensor]]:
        """Read a written file again: name, as in the record, and tensor, in whatever shape.

        Raises:
            ValueError: it is damaged.
        """

    def options(self) -> dict[str, str]:
        """Return the options: a partial output is continued by the same ones only."""
        fields = {field.name: str(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"kind": type(self).__name__, **fields}


class CompanionFiles(Protocol):
    """The files that an output has besides weights."""

    def prepare(self, folder: Path, dtypes: set[torch.dtype]) -> None:
        """Write what depends on the weights' dtypes alone: before anything else, as it may fail.

        Raises:
            ValueError: a source lacks something.
        """
        ...

    def finish(self, folder: Path, records: Mapping[str, FileRecord], random_parts: Collection[str]) -> None:
        """Write what depends on the finished files, last the manifest.

        Args:
            records: of the files, by name.
            random_parts: the source's, for the manifest.
        """
        ...


@dataclass(frozen=True)
class RunOptions:
    """The way that a conversion is run."""

    workers: int = 0
    """Files written at a time, each with one tensor in memory; 0: as many as the machine has cores, at most four."""
    overwrite: bool = False
    """Replace an existing output."""
    quiet: bool = False
    """Show no progress bar."""


def convert(conversion: Conversion, output: Path, options: RunOptions, companions: CompanionFiles) -> None:
    """Write an output folder beside its place and rename it.

    Raises:
        ValueError: the output is refused, a source is damaged or changes meanwhile, or the disk has not enough room.
    """
    check_output(output, sources=conversion.folders, overwrite=options.overwrite)
    _check_links(conversion, output)
    # torch then takes huge pages for what it copies: ordinary ones cost five times the copy itself.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    sources = _stamps(conversion.source.files())  # before anything is concluded from their content
    files = conversion.output_files()
    with conversion.source.open() as source:
        random_parts = source.random_parts
    with only_writer(output):
        restore_replaced(output)  # of a run that was killed between the two renames of its output
        partial = partial_path(output)
        records = _begin(conversion, partial, files, sources)
        _remove_unfinished(partial, records)
        _prepare(companions, partial, files, keep=bool(records))
        left = [file for file in files if file.name not in records]
        _check_space(partial.parent, sum(file.num_bytes for file in left))
        try:
            with _progress(files, records, quiet=options.quiet) as advance:
                records |= _write(conversion, left, partial, options.workers, advance, sources)
            shutil.copytree(partial / _BESIDE, partial, dirs_exist_ok=True)
            # In the order of the files, not in that in which workers finished them.
            companions.finish(partial, {file.name: records[file.name] for file in files}, random_parts)
            _check_unchanged(sources)
        except ValueError:
            # The sources are wrong: a later run must not go on with files that were made of them.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        # Not before: until here a killed run goes on from the records.
        shutil.rmtree(partial / PROGRESS)
        publish_folder(output)


def _prepare(companions: CompanionFiles, partial: Path, files: Sequence[OutputFile], *, keep: bool) -> None:
    """Make the companion files in a hidden folder: an output must not look finished before its weights are."""
    shutil.rmtree(partial / _BESIDE, ignore_errors=True)
    (partial / _BESIDE).mkdir()
    try:
        companions.prepare(partial / _BESIDE, {info.dtype for file in files for _, info in file.tensors})
    except ValueError:
        # Finished weights of an interrupted run stay: it is the companions that are at fault.
        if not keep:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_links(conversion: Conversion, output: Path) -> None:
    """Refuse an output that files of a source lead to: replacing it would destroy them."""
    inside = (path for folder in conversion.folders for path in folder.glob("*"))
    for path in (*conversion.source.files(), *inside):
        if output.resolve() in path.resolve().parents:
            raise ValueError(f"{path} leads into the output {output}, which would be replaced; choose another output")


def _stamps(paths: Sequence[Path]) -> list[_Stamp]:
    """Return path, size and time of the last change of each file."""
    stats = [(path.resolve(), path.stat()) for path in paths]
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def _check_unchanged(sources: Sequence[_Stamp]) -> None:
    """Refuse to go on where a file was replaced: the output would be half of one model, half of another."""
    for stamp in sources:
        if not Path(stamp[0]).is_file() or _stamps([Path(stamp[0])]) != [stamp]:
            raise ValueError(f"{stamp[0]} was changed while it was read; convert again when nothing writes to it")


def _begin(
    conversion: Conversion, partial: Path, files: Sequence[OutputFile], sources: Sequence[_Stamp]
) -> dict[str, FileRecord]:
    """Make the partial folder, or take an interrupted one over: return the records of its finished files."""
    fingerprint = Fingerprint.of(conversion=conversion.options(), sources=sources)
    kept = partial / PROGRESS / "conversion.json"
    # Files of other options or other sources must not end up in one output with these.
    if _read_record(kept) != fingerprint.values:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / PROGRESS).mkdir(parents=True)
        write_json(kept, fingerprint.values)
        return {}
    found = {file.name: (file, _read_record(_record_path(partial, file))) for file in files}
    records = {name: (file, cast(FileRecord, record)) for name, (file, record) in found.items() if record is not None}
    intact = in_threads(lambda name: _is_intact(conversion, partial, *records[name]), records, workers=_WORKERS)
    return {name: record for name, (_, record) in records.items() if intact[name]}


def _is_intact(conversion: Conversion, partial: Path, file: OutputFile, record: FileRecord) -> bool:
    """Return whether a file is as its record says: a machine that stopped may have left something else."""
    path = partial / file.name
    if not path.is_file() or path.stat().st_size != record.get("file_bytes"):
        return False
    try:
        found = {name: digest_of(tensor) for name, tensor in conversion.read_back(file, partial, record)}
    except ValueError:
        return False
    return found == {name: entry["xxh3_128"] for name, entry in record["tensors"].items()}


def _remove_unfinished(partial: Path, records: Mapping[str, FileRecord]) -> None:
    """Delete files without a record: they are written again, and their room is needed for that."""
    for path in partial.rglob("*"):
        name = path.relative_to(partial)
        if path.is_file() and PROGRESS not in name.parts and str(name) not in records:
            path.unlink()


def _keep_record(partial: Path, file: OutputFile, record: FileRecord) -> None:
    record["file_bytes"] = (partial / file.name).stat().st_size
    write_file(_record_path(partial, file), json.dumps(record))


def _record_path(partial: Path, file: OutputFile) -> Path:
    return partial / PROGRESS / f"{file.name.replace('/', '-')}.json"


def _read_record(path: Path) -> dict[str, object] | None:
    """Return a record, or None where it is missing or half written."""
    try:
        return read_json(path)
    except ValueError:
        return None


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        raise ValueError(
            f"the output needs {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB left; free some, or choose "
            "an output on another disk"
        )


def _write(
    conversion: Conversion,
    files: Sequence[OutputFile],
    partial: Path,
    workers: int,
    advance: Callable[[int], None],
    sources: Sequence[_Stamp],
) -> dict[str, FileRecord]:
    """Write files, several at a time, and return their records.

    In threads: reading, hashing, copying and writing let go of the interpreter, and a process costs two seconds.
    """
    stopped = threading.Event()

    def wrote(count: int) -> None:
        if stopped.is_set():
            raise CancelledError
        advance(count)

    def write(file: OutputFile) -> FileRecord:
        record = conversion.write(file, partial, wrote)
        _check_unchanged(sources)
        # After the file is on the disk: a record must not outlive a power cut that its file does not.
        _keep_record(partial, file, record)
        return record

    pool = ThreadPoolExecutor(max_workers=workers or _WORKERS)
    try:
        begun = {file.name: pool.submit(write, file) for file in files}
        # The first error ends the wait; where there is none, it lasts until all are written.
        for ended in wait(begun.values(), return_when=FIRST_EXCEPTION).done:
            ended.result()
        return {name: future.result() for name, future in begun.items()}
    finally:
        # A thread cannot be killed: each ends itself at its next tensor.
        stopped.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _progress(
    files: Sequence[OutputFile], records: Mapping[str, FileRecord], *, quiet: bool
) -> Iterator[Callable[[int], None]]:
    """Show how many bytes are written, those of an interrupted run included."""
    console = Console(stderr=True, quiet=quiet)
    if records:
        message = f"going on with an interrupted conversion: {len(records)} of {len(files)} files are there"
        console.print(message, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    total = sum(file.num_bytes for file in files)
    done = sum(file.num_bytes for file in files if file.name in records)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=quiet) as progress:
        task = progress.add_task("writing", total=total, completed=done)
        yield lambda count: progress.advance(task, count)
