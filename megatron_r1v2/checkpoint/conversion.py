"""A conversion as a list of files: written several at a time beside the output, continued after an interruption.

The output is made as `.NAME.partial` beside it and renamed when everything is on disk. Each finished file of it has a
record in `.progress/`; a run that finds a partial folder of the same conversion of the same sources goes on with it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_r1v2.checkpoint.hf.folders import (
    check_output,
    partial_of,
    publish,
    read_json,
    restore_replaced,
    write_json,
)
from megatron_r1v2.checkpoint.hf.safetensors_files import TensorInfo
from megatron_r1v2.checkpoint.manifest import PROGRESS, in_threads
from megatron_r1v2.checkpoint.tensor_files import DIGEST, digest_of

_SPARE_BYTES = 64 * 1000**2
_WORKERS = min(4, os.cpu_count() or 1)
_BESIDE = f"{PROGRESS}/beside"
_Stamp = tuple[str, int, int]
"""A file that is read: its path, size, and time of the last change in nanoseconds."""


@dataclass(frozen=True)
class Piece:
    """One file of the output."""

    name: str
    parameters: tuple[str, ...]
    """Our names of what is in it."""
    tensors: tuple[tuple[str, TensorInfo], ...]
    """What is written, in order."""

    @property
    def num_bytes(self) -> int:
        """Return its size, without headers."""
        return sum(info.num_bytes for _, info in self.tensors)


class Job(Protocol):
    """What a conversion writes."""

    def pieces(self) -> list[Piece]:
        """Return the files, the same whenever it is called; everything that can be checked beforehand is."""
        ...

    def write(self, piece: Piece, folder: Path, wrote: Callable[[int], None]) -> dict[str, Any]:
        """Write one file and return what is to be known about it, as JSON takes it.

        Several are written at a time, each in a thread; `wrote` is told of bytes, and raises when the job is given up.
        """
        ...

    def tensors(self, piece: Piece, folder: Path, record: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """Read a written file again: name, as in the record's `tensors`, and tensor, in whatever shape.

        Raises:
            ValueError: it is damaged.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Return the options, as JSON takes them: a partial output is continued by the same ones only."""
        ...

    def sources(self) -> list[Path]:
        """Return the files that are read."""
        ...

    def source_folders(self) -> list[Path]:
        """Return the folders that are read: none may be the output."""
        ...


class Rest(Protocol):
    """What an output has besides the files of a job."""

    def prepare(self, folder: Path, dtypes: set[torch.dtype]) -> None:
        """Write what does not depend on the files, given the dtypes in them: before anything else, as it may fail.

        Raises:
            ValueError: a source lacks something.
        """
        ...

    def finish(self, folder: Path, records: dict[str, dict[str, Any]]) -> None:
        """Write what depends on the files, given the folder with all else and the records of the files by name."""
        ...


@dataclass(frozen=True)
class RunOptions:
    """How a job is run."""

    workers: int = 0
    """Files written at a time, each with one tensor in memory; 0: as many as the machine has cores, at most four."""
    overwrite: bool = False
    """Replace an existing output."""
    quiet: bool = False
    """Show no progress bar."""


def run_job(
    job: Job,
    output: Path,
    options: RunOptions,
    rest: Rest,
) -> None:
    """Write an output, beside and renamed.

    Args:
        job: the files.
        output: the folder to make.
        options: how.
        rest: what is beside the files.

    Raises:
        ValueError: the output is refused, a source is damaged or changes meanwhile, or the disk has not enough room.
    """
    check_output(output, sources=job.source_folders(), overwrite=options.overwrite)
    _check_links(job, output)
    # torch then takes huge pages for what it copies: ordinary ones cost five times the copy itself.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    sources = _stamps(job.sources())  # before anything is concluded from what they hold
    pieces = job.pieces()
    partial = partial_of(output)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with _alone(partial):
        restore_replaced(output)
        _run(job, output, options, rest, pieces, sources)


def _run(
    job: Job,
    output: Path,
    options: RunOptions,
    rest: Rest,
    pieces: list[Piece],
    sources: list[_Stamp],
) -> None:
    partial = partial_of(output)
    records = _begin(job, partial, pieces, sources)
    _remove_unfinished(partial, records)
    _prepare(rest, partial, pieces, keep=bool(records))
    left = [piece for piece in pieces if piece.name not in records]
    _check_space(partial.parent, sum(piece.num_bytes for piece in left))
    console = Console(stderr=True, quiet=options.quiet)
    if records:
        told = f"going on with an interrupted conversion: {len(records)} of {len(pieces)} files are there"
        console.print(told, soft_wrap=True)
    try:
        with _progress(console, pieces, records) as advance:
            records |= _write(job, left, partial, options.workers, advance, sources)
        # In the order of the files, not in that in which workers finished them.
        shutil.copytree(partial / _BESIDE, partial, dirs_exist_ok=True)
        rest.finish(partial, {piece.name: records[piece.name] for piece in pieces})
        _check_unchanged(sources)
    except ValueError:
        # The sources are at fault: what was made of them is of no use to a later run.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(partial / PROGRESS)
    _sync(partial)
    publish(partial, output)


def _prepare(rest: Rest, partial: Path, pieces: list[Piece], *, keep: bool) -> None:
    """Make what is beside the files, out of sight until these are there: an output shall not look finished."""
    shutil.rmtree(partial / _BESIDE, ignore_errors=True)
    (partial / _BESIDE).mkdir()
    try:
        rest.prepare(partial / _BESIDE, {info.dtype for piece in pieces for _, info in piece.tensors})
    except ValueError:
        if not keep:
            shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Refuse to write where another process is writing: both would think the other's files their own."""
    path = partial.with_suffix(".lock")
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing {partial}; wait for it, or choose another output") from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise  # some network file systems have no locks: then nobody is refused
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _check_links(job: Job, output: Path) -> None:
    """Refuse an output that files of a source lead to: replacing it would destroy them."""
    for path in (*job.sources(), *(path for folder in job.source_folders() for path in folder.glob("*"))):
        if output.resolve() in path.resolve().parents:
            raise ValueError(f"{path} leads into the output {output}, which would be replaced; choose another output")


def _stamps(paths: list[Path]) -> list[_Stamp]:
    """Return what changes when a file does."""
    stats = [(path.resolve(), path.stat()) for path in paths]
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def _check_unchanged(sources: list[_Stamp]) -> None:
    """Refuse to go on where a file was replaced: the output would be half of one model, half of another."""
    for stamp in sources:
        if not Path(stamp[0]).is_file() or _stamps([Path(stamp[0])]) != [stamp]:
            raise ValueError(f"{stamp[0]} was changed while it was read; convert again when nothing writes to it")


def _begin(job: Job, partial: Path, pieces: list[Piece], sources: list[_Stamp]) -> dict[str, dict[str, Any]]:
    """Make the partial folder, or take an interrupted one over: return the records of its finished files."""
    identity = {"job": job.describe(), "sources": sources}
    described = partial / PROGRESS / "job.json"
    if not described.is_file() or _read_record(described) != json.loads(json.dumps(identity)):
        shutil.rmtree(partial, ignore_errors=True)
        (partial / PROGRESS).mkdir(parents=True)
        write_json(described, identity)
        return {}
    kept = {piece.name: (piece, _read_record(_record_path(partial, piece))) for piece in pieces}
    intact = in_threads(lambda name: _is_intact(job, partial, *kept[name]), kept, workers=_WORKERS)
    return {name: record for name, (_, record) in kept.items() if record is not None and intact[name]}


def _is_intact(job: Job, partial: Path, piece: Piece, record: dict[str, Any] | None) -> bool:
    """Return whether a file has what its record says: a machine that stopped may have left something else."""
    path = partial / piece.name
    if record is None or not path.is_file() or path.stat().st_size != record["file_bytes"]:
        return False
    try:
        found = {name: digest_of(tensor) for name, tensor in job.tensors(piece, partial, record)}
    except ValueError:
        return False
    return found == {name: entry[DIGEST] for name, entry in record["tensors"].items()}


def _remove_unfinished(partial: Path, records: Mapping[str, Any]) -> None:
    """Delete what has no record: it is written again, and its room is needed for that."""
    for path in partial.rglob("*"):
        name = path.relative_to(partial)
        if path.is_file() and PROGRESS not in name.parts and str(name) not in records:
            path.unlink()


def _keep_record(partial: Path, piece: Piece, record: dict[str, Any]) -> None:
    record["file_bytes"] = (partial / piece.name).stat().st_size
    kept = _record_path(partial, piece)
    beside = kept.with_suffix(".tmp")
    write_json(beside, record)
    os.replace(beside, kept)


def _record_path(partial: Path, piece: Piece) -> Path:
    return partial / PROGRESS / f"{piece.name.replace('/', '-')}.json"


def _read_record(path: Path) -> dict[str, Any] | None:
    """Return a record; None: there is none, or the machine stopped while it was written."""
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
    job: Job,
    pieces: list[Piece],
    partial: Path,
    workers: int,
    advance: Callable[[int], None],
    sources: list[_Stamp],
) -> dict[str, dict[str, Any]]:
    """Write files, several at a time, and return their records.

    In threads: reading, hashing, copying and writing let go of the interpreter, and a process costs two seconds.
    """
    stopped = threading.Event()

    def wrote(count: int) -> None:
        if stopped.is_set():
            raise CancelledError
        advance(count)

    def write(piece: Piece) -> dict[str, Any]:
        record = job.write(piece, partial, wrote)
        _check_unchanged(sources)
        _keep_record(partial, piece, record)
        return record

    pool = ThreadPoolExecutor(max_workers=workers or _WORKERS)
    try:
        begun = {piece.name: pool.submit(write, piece) for piece in pieces}
        for ended in wait(begun.values(), return_when=FIRST_EXCEPTION).done:
            ended.result()
        return {name: future.result() for name, future in begun.items()}
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _progress(console: Console, pieces: list[Piece], records: Mapping[str, Any]) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    total = sum(piece.num_bytes for piece in pieces)
    done = sum(piece.num_bytes for piece in pieces if piece.name in records)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=console.quiet) as progress:
        task: TaskID = progress.add_task("writing", total=total, completed=done)
        yield lambda count: progress.advance(task, count)


def _sync(folder: Path) -> None:
    """Make files and names survive a power cut before the folder gets its final name."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
