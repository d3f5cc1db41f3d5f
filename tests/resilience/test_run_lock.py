"""A folder that one run holds: refused to another, free again after a kill."""

from __future__ import annotations

import errno
import os
import signal
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_r1v2.resilience import run_lock
from megatron_r1v2.resilience.run_lock import LOCK_FILE, hold_folder
from tests.models.conftest import context
from tests.ranks import forked_context

__all__ = ["context"]


def hold(folder: Path, held: Connection) -> None:
    os.setsid()
    os.environ["SLURM_JOB_ID"] = "417"
    run_lock.objects = SimpleNamespace(all_gather=lambda item: [item])
    with hold_folder(folder, SimpleNamespace(is_main=True)):
        if os.fork() == 0:  # a checkpoint writer
            signal.pause()
        held.send("held")
        signal.pause()


def test_the_folder_of_a_run_is_refused_to_another_until_it_ends_or_is_killed(tmp_path: Path, context) -> None:
    ours, theirs = Pipe()
    # Everything is imported there already.
    holder = forked_context().Process(target=hold, args=(tmp_path / "run", theirs))
    holder.start()
    try:
        assert ours.recv() == "held"
        told = rf"run.output_dir='.*run' is in use by process {holder.pid} on .* \(job 417\) since 20"
        with pytest.raises(ValueError, match=told), hold_folder(tmp_path / "run", context):
            pass
        holder.kill()
        holder.join()
        # Its child lives on.
        with hold_folder(tmp_path / "run", context):
            assert f"process {os.getpid()} on " in (tmp_path / "run" / LOCK_FILE).read_text()
        assert not (tmp_path / "run" / LOCK_FILE).exists()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_a_file_that_the_run_before_deletes_meanwhile_is_not_held(tmp_path: Path, context, monkeypatch) -> None:
    path, lock = tmp_path / LOCK_FILE, run_lock._lock
    files = []

    def end_the_run_before(file):
        files.append(file)
        if len(files) == 1:
            path.unlink()
        return lock(file)

    monkeypatch.setattr(run_lock, "_lock", end_the_run_before)
    with hold_folder(tmp_path, context):
        assert len(files) == 2
        assert path.stat().st_ino == os.fstat(files[1].fileno()).st_ino
    assert not path.exists()


def test_a_file_system_without_locks_keeps_nobody_out_and_says_so(tmp_path: Path, context, monkeypatch, caplog) -> None:
    def refuse(code: int):
        def lockf(file, operation):
            raise OSError(code, os.strerror(code))

        return lockf

    monkeypatch.setattr(run_lock.fcntl, "lockf", refuse(errno.ENOLCK))
    with hold_folder(tmp_path, context):
        assert f"{tmp_path / LOCK_FILE} cannot be locked (" in caplog.text
    monkeypatch.setattr(run_lock.fcntl, "lockf", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"), hold_folder(tmp_path, context):
        pass
