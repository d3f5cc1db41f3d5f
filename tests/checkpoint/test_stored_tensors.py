"""Tensors that are made of runs of files, against the same made in memory."""

from __future__ import annotations

import pytest
import torch
import xxhash

from megatron_r1v2.checkpoint import direct_io
from megatron_r1v2.checkpoint.direct_io import DirectReader
from megatron_r1v2.checkpoint.hf.operations import GroupedQKV, JoinedQKV, Replicated, Split, Stacked
from megatron_r1v2.checkpoint.stored_tensors import (
    Checksum,
    FileRun,
    StoredTensor,
    check_blocks,
    rearranged,
    write_hashed,
)
from megatron_r1v2.checkpoint.tensor_files import TensorInfo, digest_of, tensor_bytes, tensor_info

QKV = GroupedQKV(3, 2, 4)
COLUMNS = 100
OPERATIONS = {
    "whole": (Replicated(), [7]),
    "split": (Split(0, 7), [7]),
    "stacked": (Stacked(6), [6, 6]),
    "grouped": (QKV, [24, 12, 12]),
    "joined": (JoinedQKV(QKV), [48]),
}


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(direct_io, "_BUFFER_BYTES", 4096)


def stored(path, tensor: torch.Tensor, *, digest: str | None) -> StoredTensor:
    """Write a tensor behind other bytes, with a checksum; "": its own."""
    path.write_bytes(b"before" + bytes(tensor_bytes(tensor)) + b"after")
    wanted = digest or digest_of(tensor)

    def compare(found: str) -> None:
        if found != wanted:
            raise ValueError(f"{path.name} is damaged")

    checksum = None if digest is None else Checksum(xxhash.xxh3_128, compare)
    return StoredTensor(path, 6, tensor_info(tensor), checksum)


def written(blocks) -> bytes:
    content = bytearray()
    assert write_hashed(content.extend, blocks) == xxhash.xxh3_128_hexdigest(content)
    return bytes(content)


@pytest.mark.parametrize("digest", [None, ""])
@pytest.mark.parametrize("name", OPERATIONS)
def test_both_directions_give_the_bytes_of_the_operation(tmp_path, name, digest):
    operation, rows = OPERATIONS[name]
    tensors = [torch.randn(count, COLUMNS, generator=torch.Generator().manual_seed(count)) for count in rows]
    whole = operation.to_shard(tensors, tensor_rank=0, tensor_size=1)
    places = [stored(tmp_path / str(number), one, digest=digest) for number, one in enumerate(tensors)]
    with DirectReader() as reader:
        (blocks,) = rearranged(places, reader, lambda parts: [operation.blocks(parts)])
        assert written(blocks) == tensor_bytes(whole).tobytes()
        # A checksum of the bytes in their order wants such a tensor whole in memory.
        out_of_order = digest is not None and name == "joined"
        assert all(isinstance(block, torch.Tensor if out_of_order else FileRun) for block in blocks)
        place = stored(tmp_path / "whole", whole, digest=digest)
        made = rearranged([place], reader, lambda parts: operation.hf_blocks(parts[0]))
        assert [written(blocks) for blocks in made] == [tensor_bytes(one).tobytes() for one in tensors]
        out_of_order = digest is not None and name in ("joined", "grouped")
        assert all(isinstance(b, torch.Tensor if out_of_order else FileRun) for blocks in made for b in blocks)


@pytest.mark.parametrize("name", OPERATIONS)
def test_damage_is_found_wherever_it_is(tmp_path, name):
    operation, rows = OPERATIONS[name]
    whole = operation.to_shard([torch.randn(n, COLUMNS) for n in rows], tensor_rank=0, tensor_size=1)
    place = stored(tmp_path / "whole", whole, digest="")
    content = place.path.read_bytes()
    for at in (6, len(content) // 2, len(content) - 6):
        place.path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with DirectReader() as reader, pytest.raises(ValueError, match="whole is damaged"):
            [written(blocks) for blocks in rearranged([place], reader, lambda parts: operation.hf_blocks(parts[0]))]


def test_views_that_are_not_rows_are_made_in_memory(tmp_path):
    tensor = torch.arange(12.0).view(3, 4)
    place = stored(tmp_path / "file", tensor, digest=None)
    with DirectReader() as reader:
        ((block,),) = rearranged([place], reader, lambda parts: [[parts[0][:, 1:3]]])
    assert torch.equal(block, tensor[:, 1:3])


def test_a_tensor_is_read_whole(tmp_path):
    tensor = torch.randn(50, 60).to(torch.bfloat16)
    with DirectReader() as reader:
        assert torch.equal(stored(tmp_path / "file", tensor, digest="").read(reader), tensor)
        with pytest.raises(ValueError, match="file is damaged"):
            stored(tmp_path / "file", tensor, digest="0" * 32).read(reader)


def test_the_digest_of_blocks_is_that_of_the_whole():
    whole = torch.randn(700, 1000, generator=torch.Generator().manual_seed(0))  # more than one piece
    assert written([whole[:3], whole[3:]]) == whole.numpy().tobytes()


def test_blocks_must_make_the_tensor(tmp_path):
    info = TensorInfo(torch.float32, (3, 4))
    run = stored(tmp_path / "file", torch.zeros(2, 4), digest=None)
    check_blocks("it", [torch.zeros(3, 4)], info)
    with DirectReader() as reader:
        (blocks,) = rearranged([run], reader, lambda parts: [parts])
        check_blocks("it", [*blocks, torch.zeros(1, 4)], info)
        for wrong in (blocks, [torch.zeros(3, 4).half()], [torch.zeros(4, 4)]):
            with pytest.raises(ValueError, match=r"it came out as .* where .* was announced"):
                check_blocks("it", wrong, info)
