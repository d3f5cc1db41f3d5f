"""Headers of safetensors files that somebody damaged or made up, and files written one tensor at a time."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1v2.checkpoint.hf.safetensors_files import map_safetensors_file, write_safetensors_file
from megatron_r1v2.checkpoint.tensor_files import digest_of, tensor_info


def header_file(path: Path, header: object, *, data: int = 16, length: int | None = None, raw: bytes = b"") -> Path:
    encoded = raw or json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + bytes(data))
    return path


def entry(start: int, end: int, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"header": {"a": entry(0, 8), "b": entry(4, 12)}, "data": 12}, "invalid offset for tensor"),
        ({"header": {"a": entry(0, 8), "b": entry(12, 20)}, "data": 20}, "invalid offset for tensor"),
        ({"header": {"a": entry(0, 8)}, "data": 4}, "file not fully covered"),
        ({"header": {"a": entry(0, 8)}, "data": 16}, "file not fully covered"),
        ({"header": {"a": entry(8, 0)}, "data": 8}, "invalid offset for tensor"),
        ({"header": {"a": entry(-8, 0)}, "data": 8}, "expected usize"),
        ({"header": {"a": entry(0, 8, (3,))}, "data": 8}, "invalid shape, data type, or offset"),
        ({"header": {"a": entry(0, 8, (2**62, 2**62))}, "data": 8}, "overflow computing buffer size"),
        ({"header": {"a": entry(0, 8, (True, 2))}, "data": 8}, "expected usize"),
        ({"header": {"a": entry(0, 8, dtype="F31")}, "data": 8}, "unknown variant `F31`"),
        ({"header": {"a": entry(0, 8) | {"dtype": []}}, "data": 8}, "expected string"),
        ({"header": {"a": entry(0, 0, (0, 2**63))}, "data": 0}, "beyond what any machine counts"),
        ({"header": {"a": entry(0, 0, (0, 2**62, 2**62))}, "data": 0}, "beyond what any machine counts"),
        ({"header": {"a": None}, "data": 8}, "expected struct TensorInfo"),
        ({"header": [1]}, "invalid JSON in header"),
        (
            {"header": {}, "raw": b'{"a":' + json.dumps(entry(0, 8)).encode() + b',"a":' + b"1}"},
            "invalid JSON in header",
        ),
        ({"header": {}, "raw": b"[" * 100_000}, "cannot be read"),
        ({"header": {}, "raw": b"\xff\xfe{}"}, "cannot be read"),
        ({"header": {"__metadata__": {"a": 1}}}, "expected a string"),
        ({"header": {}, "length": 2**63}, "header too large"),
        ({"header": {"a": entry(0, 16, (4,), dtype="C32")}}, "unknown variant `C32`"),
        ({"header": {"a": entry(0, 16, (2,), dtype="C64")}}, "'a' has the dtype C64; accepted: F64"),
        ({"header": {"a": entry(0, 8), "b": entry(0, 8)}, "data": 8}, "invalid offset for tensor"),
        ({"header": {"a": entry(0, 8)}, "raw": b'{"a":' + json.dumps(entry(0, 8)).encode(), "data": 8}, "invalid JSON"),
        ({"header": {}, "length": 10**12}, "header too large"),
    ],
)
def test_hostile_headers_are_named(tmp_path, content, told):
    path = header_file(tmp_path / "model.safetensors", **content)
    with pytest.raises(ValueError, match="model.safetensors .*cannot be read") as error:
        map_safetensors_file(path)
    assert told in str(error.value)


def test_a_file_is_written_one_tensor_at_a_time_and_read_in_place(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4, dtype=torch.int64), "empty": torch.zeros(0, 7)}
    infos = [(name, tensor_info(tensor)) for name, tensor in tensors.items()]
    counted = []
    digests = write_safetensors_file(
        tmp_path / "file", infos, ([tensor] for tensor in tensors.values()), wrote=counted.append
    )
    assert digests == {name: digest_of(tensor) for name, tensor in tensors.items()}
    assert counted == [60, 32, 0]
    for read in (load_file(tmp_path / "file"), map_safetensors_file(tmp_path / "file")):
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_tensors_that_are_not_aligned_are_read(tmp_path):
    numbers = torch.arange(2, dtype=torch.float32)
    path = header_file(tmp_path / "file", {"b": entry(1, 9), "a": entry(0, 1, (1,), "U8")}, data=0)
    path.write_bytes(path.read_bytes() + b"\7" + numbers.numpy().tobytes())
    read = map_safetensors_file(path)
    assert torch.equal(read["b"], numbers)
    assert read["a"].tolist() == [7]


def test_a_tensor_that_comes_out_otherwise_is_refused(tmp_path):
    info = tensor_info(torch.zeros(2))
    with pytest.raises(ValueError, match="a came out as .* where .* was announced"):
        write_safetensors_file(tmp_path / "file", [("a", info)], [[torch.zeros(3)]])
