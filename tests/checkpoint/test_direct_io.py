"""Reads and writes past the page cache against ordinary ones, at positions and sizes of every kind."""

from __future__ import annotations

import errno
import os
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_r1v2.checkpoint import direct_io
from megatron_r1v2.checkpoint.direct_io import DirectReader, direct_file

PROPERTY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """Of two blocks, so that a file of some KiB goes through many."""
    monkeypatch.setattr(direct_io, "_BUFFER_BYTES", 8192)


@pytest.fixture(params=["direct", "refused"])
def direct(request, monkeypatch):
    """Whether the file system takes direct reads and writes."""
    if request.param == "refused":
        original = os.open

        def refusing(path, flags, *mode):
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return original(path, flags, *mode)

        monkeypatch.setattr(os, "open", refusing)


@PROPERTY
@given(size=st.integers(1, 40_000), data=st.data())
def test_a_run_is_read_from_anywhere(direct, tmp_path, size, data):
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    with DirectReader() as reader:
        for _ in range(3):
            start = data.draw(st.integers(0, size - 1))
            length = data.draw(st.integers(0, size - start))
            pieces = [bytes(piece) for piece in reader.read(tmp_path / "file", start, length)]
            assert b"".join(pieces) == content[start : start + length]
            assert all(pieces)


@pytest.mark.parametrize("size", [0, 100, 4096, 8192, 20_000])
def test_a_file_that_ends_too_early_is_named(direct, tmp_path, size):
    (tmp_path / "file").write_bytes(bytes(size))
    with DirectReader() as reader, pytest.raises(ValueError, match=rf"file ends at byte {size}, before byte 24000"):
        list(reader.read(tmp_path / "file", 10, 23_990))


@PROPERTY
@given(parts=st.lists(st.integers(0, 30_000), max_size=6))
def test_what_is_written_is_in_the_file(direct, tmp_path, parts):
    contents = [os.urandom(size) for size in parts]
    with direct_file(tmp_path / "file") as file:
        for content in contents:
            assert file.write(content) == len(content)
        assert file.tell() == sum(parts)
    assert (tmp_path / "file").read_bytes() == b"".join(contents)


@PROPERTY
@given(size=st.integers(1, 40_000), data=st.data())
def test_what_is_mended_later_is_in_the_file(direct, tmp_path, size, data):
    """On the disk already, still in the buffer, or across both."""
    content = bytearray(os.urandom(size))
    with direct_file(tmp_path / "file") as file:
        file.write(content)
        for _ in range(2):
            start = data.draw(st.integers(0, size - 1))
            other = os.urandom(data.draw(st.integers(1, size - start)))
            file.seek(start)
            file.write(other)
            content[start : start + len(other)] = other
        file.seek(size)
        file.write(b"end")
    assert (tmp_path / "file").read_bytes() == content + b"end"


def test_zipfile_writes_into_it(direct, tmp_path):
    content = os.urandom(50_000)
    with direct_file(tmp_path / "file") as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("large", "w", force_zip64=True) as member:
            member.write(content)
        archive.writestr("small", b"text")
    with zipfile.ZipFile(tmp_path / "file") as archive:
        assert archive.testzip() is None
        assert (archive.read("large"), archive.read("small")) == (content, b"text")


@pytest.mark.parametrize("size", [100, 50_000])
def test_a_full_disk_ends_it(tmp_path, monkeypatch, size):
    def failing(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(OSError, match="No space left"), direct_file(tmp_path / "file") as file:
        file.write(bytes(size))


def test_nothing_is_finished_when_the_block_fails(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with pytest.raises(TypeError), direct_file(tmp_path / "file") as file:
        file.write(bytes(20_000) + file)
    assert synced == []
    with direct_file(tmp_path / "file") as file:
        file.write(b"new")
    assert len(synced) == 1
    assert (tmp_path / "file").read_bytes() == b"new"
