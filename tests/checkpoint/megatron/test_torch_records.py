"""Records against torch's own reader and writer."""

from __future__ import annotations

import io
import sys
import zipfile

import pytest
import torch

from megatron_r1v2.checkpoint.megatron.torch_records import read_record, write_record
from megatron_r1v2.checkpoint.tensor_files import TensorInfo, digest_of, mapped_file, tensor_info

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def read(path, start: int = 0) -> torch.Tensor:
    with path.open("rb") as file:
        mapped = mapped_file(path)
        return read_record(file, start, len(mapped) - start, mapped, check_crc=True)


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return tensor_info(one) == tensor_info(two) and digest_of(one) == digest_of(two)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_reads_what_is_written(tmp_path, dtype):
    tensor = numbers(3, 5, 7, dtype=dtype)
    path = tmp_path / "records"
    with path.open("wb") as file:
        file.write(b"what was before")
        start, digest = write_record(file, tensor_info(tensor), [tensor[:1], tensor[1:3]])
    assert digest == digest_of(tensor)
    record = path.read_bytes()[start:]
    assert same(torch.load(io.BytesIO(record), weights_only=True), tensor)
    with zipfile.ZipFile(io.BytesIO(record)) as archive:
        assert archive.testzip() is None
    got = read(path, start)
    assert same(got, tensor)
    assert got.data_ptr() % 64 == 0  # in place: mapped, and aligned


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0, 1])
def test_what_torch_writes_is_read(tmp_path, dtype, shift):
    """Wherever in a file it lies; views and transposed matrices are written with all of their storage."""
    for number, tensor in enumerate([numbers(4, 6, dtype=dtype), numbers(4, 6, dtype=dtype).T[2:5, 1:3]]):
        path = tmp_path / str(number)
        with path.open("wb") as file:
            file.write(bytes(shift))
            torch.save(tensor, file)
        got = read(path, shift)
        assert same(got, tensor)
        assert got.data_ptr() % dtype.itemsize == 0


def test_what_is_written_in_several_goes_has_one_digest(tmp_path):
    tensor = torch.arange(700_000, dtype=torch.int32)
    with (tmp_path / "records").open("wb") as file:
        assert write_record(file, tensor_info(tensor), [tensor[:3], tensor[3:]]) == (0, digest_of(tensor))
    assert same(read(tmp_path / "records"), tensor)


def test_blocks_must_make_the_tensor():
    for blocks in ([numbers(2, 3)], [numbers(3, 3, dtype=torch.float16)], [numbers(2, 3), numbers(2, 3)]):
        with pytest.raises(ValueError, match="was announced"):
            write_record(io.BytesIO(), TensorInfo(torch.bfloat16, (3, 3)), blocks)


HOSTILE = b"cos\nsystem\n(S'touch was-run'\ntR."
OTHER_ORDER = b"big" if sys.byteorder == "little" else b"little"


@pytest.mark.parametrize(
    ("told", "changed", "compression"),
    [
        ("wants to call posix.system|wants to call os.system", {"data.pkl": HOSTILE}, zipfile.ZIP_STORED),
        ("byte order", {"byteorder": OTHER_ORDER}, zipfile.ZIP_STORED),
        ("compressed", {}, zipfile.ZIP_DEFLATED),
        ("out of bounds", {"data/0": bytes(16)}, zipfile.ZIP_STORED),
        ("no item named", {"version": b"3", "data/0": None}, zipfile.ZIP_STORED),
    ],
)
def test_what_is_no_plain_tensor_is_refused(tmp_path, monkeypatch, told, changed, compression):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "record"
    torch.save(torch.arange(4), path)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.split("/", 1)[1]: archive.read(info) for info in archive.infolist()} | changed
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            if data is not None:
                archive.writestr(f"archive/{name}", data)
    with pytest.raises(ValueError, match=f"record at byte 0 is damaged.*({told})"):
        read(path)
    assert not (tmp_path / "was-run").exists()


def test_a_flipped_bit_is_found_by_the_crc(tmp_path):
    path = tmp_path / "record"
    torch.save(torch.arange(100, 104), path)
    content = path.read_bytes()
    at = content.index(torch.arange(100, 104).numpy().tobytes())
    path.write_bytes(content[:at] + b"\1" + content[at + 1 :])
    with pytest.raises(ValueError, match="checksum of record/data/0 is wrong"):
        read(path)
