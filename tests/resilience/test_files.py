"""Files and folders that are written beside and renamed: a reader never sees half of one, whenever the writer dies."""

import multiprocessing
import os
import signal
import stat
import threading
from pathlib import Path

import pytest

from megatron_r1v2.resilience import files
from megatron_r1v2.resilience.files import (
    atomic_file,
    atomic_folder,
    delete_folder,
    only_writer,
    partial_path,
    publish_folder,
    remove_leftovers,
    restore_replaced,
    start_folder,
    sync,
    synced_file,
    write_file,
)
from megatron_r1v2.resilience.json_lines import append_json_lines


class Killed(BaseException):
    """A stand-in for SIGKILL where the process must go on: nothing catches it."""


def write_half(path: Path) -> None:
    """Write something and raise, as the body of a block that goes wrong."""
    path.write_text("half")
    raise Killed


@pytest.fixture
def calls(monkeypatch):
    """Record what reaches the disk and in which order, as (what, name)."""
    recorded: list[tuple[str, str]] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def name_of(descriptor: int) -> str:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        return f"{kind} {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}"

    def record(what, function):
        def recorded_call(first, *rest):
            name = name_of(first) if isinstance(first, int) else Path(first).name
            function(first, *rest)
            recorded.append((what, name))

        return recorded_call

    monkeypatch.setattr(os, "fsync", record("fsync", fsync))
    monkeypatch.setattr(os, "replace", record("rename", replace))
    monkeypatch.setattr(os, "rename", record("rename", rename))
    return recorded


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_after(tmp_path, calls):
    write_file(tmp_path / "a.json", '{"caf\u00e9": 1}')
    assert (tmp_path / "a.json").read_bytes() == '{"caf\u00e9": 1}'.encode()
    assert calls == [
        ("fsync", "file .a.json.partial"),
        ("rename", ".a.json.partial"),
        ("fsync", f"folder {tmp_path.name}"),
    ]
    assert names(tmp_path) == ["a.json"]


def test_bytes_and_missing_folders(tmp_path):
    write_file(tmp_path / "x" / "y" / "a.bin", b"\x00\xff")
    assert (tmp_path / "x" / "y" / "a.bin").read_bytes() == b"\x00\xff"


def test_readers_see_the_old_content_until_the_new_is_whole(tmp_path):
    path = tmp_path / "a"
    write_file(path, "old")
    with atomic_file(path) as file:
        file.write(b"new, but only ha")
        file.flush()
        assert path.read_text() == "old"
        assert partial_path(path).read_text() == "new, but only ha"
    assert path.read_text() == "new, but only ha"


def test_a_block_that_raises_leaves_the_old_file_and_nothing_beside(tmp_path):
    path = tmp_path / "a"
    write_file(path, "old")
    with pytest.raises(Killed), atomic_file(path):
        write_half(partial_path(path))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_text_that_cannot_be_encoded_loses_nothing(tmp_path):
    write_file(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        write_file(tmp_path / "a", "\ud800")
    assert (tmp_path / "a").read_text() == "old"


def test_a_disk_that_fails_to_sync_loses_nothing(tmp_path, monkeypatch):
    write_file(tmp_path / "a", "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_is_named(tmp_path):
    full = tmp_path / "metrics.jsonl"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
        append_json_lines(full, [{"step": 1}])
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"), synced_file(full) as file:
        file.write(b"content")


def test_what_a_killed_process_left_is_taken_over(tmp_path):
    partial_path(tmp_path / "a").write_text("much longer than what is written now")
    write_file(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_a_link_stays_a_link_and_is_written_through(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "disk" / "real")
    write_file(tmp_path / "a", "content")
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "disk" / "real").read_text() == "content"
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with atomic_folder(tmp_path / "out", replace=True) as folder:
        assert folder.parent == tmp_path
        (folder / "new").write_text("1")
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "disk") == ["new"]


def test_a_link_to_a_folder_that_is_gone_makes_nothing_elsewhere(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "unmounted" / "runs")
    for write in (lambda path: write_file(path, "1"), start_folder):
        with pytest.raises(FileExistsError):
            write(tmp_path / "runs" / "a")
    assert not (tmp_path / "unmounted").exists()


def test_the_working_folder_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert partial_path(".") == tmp_path.with_name(f".{tmp_path.name}.partial")
    assert partial_path("a") == Path(".a.partial")
    write_file("a", "1")
    assert names(tmp_path) == ["a"]


def _write_until_killed(path: Path, size: int) -> None:
    for number in range(10**9):
        write_file(path, f"{number % 10}" * size)


def test_a_writer_killed_anywhere_leaves_one_whole_content(tmp_path):
    path, size = tmp_path / "a", 200_000
    for attempt in range(5):
        writer = multiprocessing.get_context("fork").Process(target=_write_until_killed, args=(path, size))
        writer.start()
        try:
            while not path.exists():
                pass
            for _ in range(20 * attempt + 1):  # reads race with renames
                content = path.read_text()
                assert (len(content), len(set(content))) == (size, 1)
        finally:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        content = path.read_text()
        assert (len(content), len(set(content))) == (size, 1)
        assert set(names(tmp_path)) <= {"a", ".a.partial"}


def test_synced_file_keeps_its_name_and_is_synced_only_when_whole(tmp_path, calls):
    with synced_file(tmp_path / "a") as file:
        file.write(b"x")
    assert calls == [("fsync", "file a")]
    with pytest.raises(Killed), synced_file(tmp_path / "b"):
        write_half(tmp_path / "b")
    assert calls == [("fsync", "file a")]


def test_a_folder_appears_whole_and_synced(tmp_path, calls):
    target = tmp_path / "out"
    with atomic_folder(target) as folder:
        assert folder == partial_path(target)
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "1"
    assert names(tmp_path) == ["out"]
    renamed = calls.index(("rename", ".out.partial"))
    before = {("fsync", "file a"), ("fsync", "folder sub"), ("fsync", "folder .out.partial")}
    assert set(calls[:renamed]) == before
    assert calls[renamed + 1 :] == [("fsync", f"folder {tmp_path.name}")]


def test_a_folder_that_exists_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"out exists already; choose another folder or delete it first"):
        atomic_folder(tmp_path / "out").__enter__()
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_block_that_raises_leaves_nothing_new(tmp_path, replace):
    target = tmp_path / "out"
    if replace:
        target.mkdir()
        (target / "old").write_text("old")
    with pytest.raises(Killed), atomic_folder(target, replace=replace) as folder:
        write_half(folder / "new")
    assert names(tmp_path) == (["out"] if replace else [])
    assert not replace or names(target) == ["old"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with atomic_folder(target, replace=True) as folder:
        (folder / "new").write_text("new")
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_replacement_killed_between_its_renames_is_undone_by_the_next(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    (start_folder(target) / "new").write_text("new")
    rename = os.rename

    def killed_at_the_second(source, destination):
        if Path(source) == partial_path(target):
            raise Killed
        rename(source, destination)

    monkeypatch.setattr(os, "rename", killed_at_the_second)
    with pytest.raises(Killed):
        publish_folder(target)
    assert names(tmp_path) == [".out.partial", ".out.replaced"]
    monkeypatch.undo()
    restore_replaced(target)
    assert names(target) == ["old"]
    restore_replaced(target)  # nothing left to do
    with atomic_folder(target, replace=True) as folder:
        assert names(folder) == []
        (folder / "newer").write_text("newer")
    assert names(target) == ["newer"]
    assert names(tmp_path) == ["out"]


def test_a_replacement_whose_second_rename_fails_leaves_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    rename = os.rename

    def failing(source, destination):
        if Path(source) == partial_path(target):
            raise PermissionError
        rename(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(PermissionError), atomic_folder(target, replace=True) as folder:
        (folder / "new").write_text("new")
    assert names(target) == ["old"]
    assert names(tmp_path) == ["out"]


def test_what_was_moved_away_never_replaces_a_finished_folder(tmp_path):
    for name in ("out", ".out.replaced"):
        (tmp_path / name).mkdir()
    (tmp_path / "out" / "new").write_text("new")
    restore_replaced(tmp_path / "out")
    assert names(tmp_path / "out") == ["new"]


def test_a_started_folder_is_empty_of_what_was_left(tmp_path):
    partial_path(tmp_path / "out").mkdir()
    (partial_path(tmp_path / "out") / "half").write_text("ha")
    assert names(start_folder(tmp_path / "out")) == []


def test_a_deletion_killed_on_the_way_leaves_no_half_folder_under_the_name(tmp_path, monkeypatch):
    target = tmp_path / "step-00000001"
    target.mkdir()
    (target / "a").write_text("1")
    (target / "b").write_text("2")
    rmtree = files.shutil.rmtree

    def killed(path, **options):
        if Path(path).exists():
            (Path(path) / "a").unlink()
            raise Killed
        rmtree(path, **options)

    monkeypatch.setattr(files.shutil, "rmtree", killed)
    with pytest.raises(Killed):
        delete_folder(target)
    assert names(tmp_path) == [".step-00000001.partial"]
    monkeypatch.undo()
    remove_leftovers(tmp_path, "step-*")
    assert names(tmp_path) == []


def test_a_deleted_folder_is_gone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("1")
    delete_folder(tmp_path / "out")
    assert names(tmp_path) == []


def test_leftovers_of_other_names_stay(tmp_path):
    for name in (".step-1.partial", ".other.partial", "step-2", "step-3.damaged"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path, "step-*")
    assert names(tmp_path) == [".other.partial", "step-2", "step-3.damaged"]


def test_a_second_writer_is_refused_and_harms_nothing(tmp_path):
    target = tmp_path / "out"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        with pytest.raises(ValueError, match=r"another process is writing .*out.partial; wait for it, or choose"):
            atomic_folder(target).__enter__()
        assert names(folder) == ["a"]
    assert names(target) == ["a"]
    with only_writer(target):
        pass
    assert names(tmp_path) == ["out"]


def test_a_file_system_without_locks_refuses_nobody(tmp_path, monkeypatch):
    def refuse(code):
        def flock(file, operation):
            raise OSError(code, os.strerror(code))

        return flock

    monkeypatch.setattr(files.fcntl, "flock", refuse(files.errno.ENOLCK))
    with only_writer(tmp_path / "out"):
        pass
    monkeypatch.setattr(files.fcntl, "flock", refuse(files.errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        only_writer(tmp_path / "out").__enter__()


def test_sync_takes_files_and_folders(tmp_path, calls):
    (tmp_path / "a").write_text("1")
    sync(tmp_path / "a")
    sync(tmp_path)
    assert calls == [("fsync", "file a"), ("fsync", f"folder {tmp_path.name}")]


def test_writers_of_different_names_do_not_meet(tmp_path):
    threads = [threading.Thread(target=write_file, args=(tmp_path / f"{n}", str(n) * 1000)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(tmp_path / f"{n}").read_text() for n in range(8)] == [str(n) * 1000 for n in range(8)]
