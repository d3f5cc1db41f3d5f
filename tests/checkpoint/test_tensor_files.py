"""Bytes of tensors: mapped in place, hashed as they are written."""

from __future__ import annotations

import threading

import pytest
import torch
import xxhash

from megatron_r1v2.checkpoint.tensor_files import (
    TensorInfo,
    byte_pieces,
    digest_of,
    in_threads,
    mapped_file,
    tensor_bytes,
    tensor_in,
    tensor_info,
)


def test_an_info_knows_size_and_name_without_data():
    info = tensor_info(torch.zeros(3, 5, dtype=torch.bfloat16))
    assert info == TensorInfo(torch.bfloat16, (3, 5))
    assert (info.num_bytes, info.dtype_name) == (30, "bfloat16")
    assert info.meta().is_meta
    assert tensor_info(info.meta()) == info


@pytest.mark.parametrize("start", [0, 4, 6, 3])
def test_numbers_are_read_in_place_where_they_are_aligned(tmp_path, start):
    tensor = torch.arange(10, dtype=torch.int32)
    path = tmp_path / "file"
    path.write_bytes(bytes(start) + tensor.numpy().tobytes())
    mapped = mapped_file(path)
    read = tensor_in(mapped[start:], torch.int32, start=start)
    assert torch.equal(read, tensor)
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    assert (read.data_ptr() == whole.data_ptr() + start) == (start % 4 == 0)
    read[0] = 7  # stays in memory
    assert path.read_bytes()[start : start + 4] == bytes(4)


def test_no_bytes_are_a_tensor_without_numbers(tmp_path):
    assert tensor_in(memoryview(b""), torch.float32, start=3).shape == (0,)


def test_pieces_are_the_bytes_of_the_whole():
    whole = torch.randn(700, 1000, generator=torch.Generator().manual_seed(0))
    pieces = list(byte_pieces(whole))
    assert len(pieces) > 1
    assert b"".join(pieces) == whole.numpy().tobytes()
    assert digest_of(whole) == xxhash.xxh3_128_hexdigest(whole.numpy().tobytes())
    assert bytes(tensor_bytes(whole.T)) == whole.T.contiguous().numpy().tobytes()


def test_threads_keep_the_order_and_pass_errors_on():
    names = [str(number) for number in range(20)]
    found = in_threads(lambda name: (int(name), threading.current_thread().name), names, workers=3)
    assert list(found) == names
    assert [number for number, _ in found.values()] == list(range(20))
    with pytest.raises(ValueError, match="invalid literal"):
        in_threads(int, ["1", "x"], workers=2)
