"""The lock of a run's folder: two runs in one folder would write each other's checkpoints and metrics."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from megatron_r1v2.parallel import objects
from megatron_r1v2.parallel.groups import ParallelContext

logger = logging.getLogger(__name__)

LOCK_FILE = ".running"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def hold_folder(folder: Path, context: ParallelContext, *, output_dir: Path | None = None) -> Iterator[None]:
    """Collective over all ranks: keep other runs out of a folder while the block runs.

    A killed run holds nothing. Where the file system has no locks nobody is kept out, which the log says.

    Args:
        output_dir: that of the recipe; None: the folder itself.

    Raises:
        ValueError: another run is in the folder; the message says which.
    """
    with ExitStack() as held:
        holder = ""
        if context.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            holder = _hold(folder / LOCK_FILE, held)
        if holder := objects.all_gather(holder)[0]:
            raise ValueError(
                f"run.output_dir={str(output_dir or folder)!r} is in use by {holder}; wait until that run has ended, "
                "or choose another folder"
            )
        yield


def _hold(path: Path, held: ExitStack) -> str:
    """Lock a file until a stack is closed, which deletes it; return the other process that holds it, or ""."""
    while True:
        file = held.enter_context(path.open("a+", encoding="utf-8"))
        if holder := _lock(file):
            return holder
        # A run that ended between the two calls has deleted it: the next run would find a new file, which nobody holds.
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            held.callback(path.unlink, missing_ok=True)
            return ""


def _lock(file: TextIO) -> str:
    """Lock a file and write into it who holds it; return who does where it is another process, else ""."""
    try:
        # A record lock, not flock: a forked checkpoint writer that outlives its killed parent must not inherit it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            return file.read().strip() or "another process"
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s cannot be locked (%s): see to it that no other run is in its folder", file.name, error)
    file.truncate(0)
    job = os.environ.get("SLURM_JOB_ID")
    began = datetime.now(UTC).isoformat(timespec="seconds")
    file.write(f"process {os.getpid()} on {platform.node()}{f' (job {job})' if job else ''} since {began}\n")
    file.flush()
    return ""
