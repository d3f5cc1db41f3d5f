"""The one way to write a file or a folder: beside its place as `.NAME.partial`, onto the disk, then renamed.

A reader of NAME finds the old content or the new one, never half of it, even after a power cut. What a killed process
leaves is called `.NAME.partial`, and the next one that writes NAME removes it. A NAME has one writer at a time.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def partial_path(path: Path | str) -> Path:
    """Return the path that is written to until it is complete and becomes `path`."""
    return _beside(path, "partial")


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Name the file in an error of its writing: the system says that a disk is full, not which."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def synced_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file under its own name for writing; its content is on the disk when the block ends well."""
    with named_errors(path), path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic_file(path: Path | str) -> Iterator[BinaryIO]:
    """Open a file for writing that becomes `path` when the block ends well; otherwise `path` stays as it was.

    Folders above it are made where they are missing.
    """
    partial = partial_path(path)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with synced_file(partial) as file:
            yield file
        os.replace(partial, _target(path))
    finally:
        partial.unlink(missing_ok=True)
    # The name is on the disk only when the folder is; without this a power cut can bring the old file back.
    sync(partial.parent)


def write_file(path: Path | str, content: str | bytes) -> None:
    """Write a whole file through `atomic_file`, text as UTF-8."""
    with atomic_file(path) as file:
        # In binary: text mode would leave the encoding to the machine's locale.
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path | str, content: Mapping[str, object]) -> None:
    """Write a JSON object through `atomic_file`, readable and with a final newline."""
    write_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def atomic_folder(path: Path | str, *, replace: bool = False) -> Iterator[Path]:
    """Give an empty folder to write into that becomes `path` when the block ends well.

    When the block raises, the folder is removed and `path` is as it was.

    Raises:
        ValueError: `path` exists and is not to be replaced, or another process is writing it.
    """
    if not replace and Path(path).exists():
        raise ValueError(f"{path} exists already; choose another folder or delete it first")
    with only_writer(path):
        if replace:
            restore_replaced(path)
        partial = start_folder(path)
        try:
            yield partial
            publish_folder(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            restore_replaced(path)  # where the second rename of `publish_folder` failed


def start_folder(path: Path | str) -> Path:
    """Make the partial folder of `path`, without what a killed process left there, and return it.

    With `publish_folder`, for folders that several processes write together; for one process there is `atomic_folder`.
    """
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def publish_folder(path: Path | str) -> None:
    """Bring the partial folder of `path` onto the disk and rename it; a folder that `path` was before is deleted."""
    partial, replaced, target = partial_path(path), _beside(path, "replaced"), _target(path)
    # Before the rename, which could reach the disk first: the name would then stand for files without their content.
    for entry in (*partial.rglob("*"), partial):
        sync(entry)
    shutil.rmtree(replaced, ignore_errors=True)
    # A folder that is not empty cannot be renamed over; a process killed between the two renames leaves the old one
    # beside, which `restore_replaced` brings back.
    if target.exists():
        os.rename(target, replaced)
    os.rename(partial, target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_replaced(path: Path | str) -> None:
    """Put back the folder that `publish_folder`, killed between its two renames, had moved away."""
    replaced, target = _beside(path, "replaced"), _target(path)
    if replaced.exists() and not target.exists():
        os.rename(replaced, target)


def delete_folder(path: Path | str) -> None:
    """Delete a folder so that a process killed on the way leaves no half of it under its name."""
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    os.rename(_target(path), partial)
    shutil.rmtree(partial)


def put_aside(folder: Path, suffix: str) -> None:
    """Rename a folder to NAME.SUFFIX, which is overwritten, so that nobody takes it for what its name says."""
    aside = folder.with_name(f"{folder.name}.{suffix}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Delete what killed processes left of folders in `folder` whose names match a glob pattern."""
    for leftover in folder.glob(f".{pattern}.partial"):
        shutil.rmtree(leftover)


@contextmanager
def only_writer(path: Path | str) -> Iterator[None]:
    """Refuse to write where another process is writing: each would take the other's files for its own.

    Raises:
        ValueError: another process is.
    """
    lock = _beside(path, "lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is writing {partial_path(path)}; wait for it, or choose another output"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise  # some network file systems have no locks: then nobody is refused
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path | str, suffix: str) -> Path:
    target = _target(path)
    return target.with_name(f".{target.name}.{suffix}")


def _target(path: Path | str) -> Path:
    """Return the path that is renamed to: a link stays a link, and the rename within one file system."""
    path = Path(path)
    return path.resolve() if path.is_symlink() or path.name in ("", "..") else path
