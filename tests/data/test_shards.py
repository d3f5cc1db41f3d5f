from __future__ import annotations

import gc
import os
import tarfile
import time
from pathlib import Path

import pytest
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_loader,
    get_train_dataset,
    stateless,
)

from megatron_r1v2.data.samples import SampleError
from megatron_r1v2.data.shards import check_shards, is_held_out, write_shards, write_split_shards
from tests.tiny import tiny_sample, tiny_shards


@edataclass
class Raw(Sample):
    json: bytes


@stateless
def cook(sample: dict) -> Raw:
    return Raw(**basic_sample_keys(sample), json=sample["json"])


class RawEncoder(DefaultTaskEncoder):
    cookers = (Cooker(cook),)
    decoder = None

    def __init__(self) -> None:
        super().__init__(batch_type=Raw, raw_batch_type=Raw)


def test_shards_hold_the_samples_in_order(tmp_path: Path) -> None:
    folder = tiny_shards(tmp_path / "data", 25)
    assert check_shards(folder) == {"shard-000000.tar": 10, "shard-000001.tar": 10, "shard-000002.tar": 5}
    with tarfile.open(folder / "shard-000002.tar") as tar:
        names = tar.getnames()
    assert names[:2] == ["digits-0020.0.png", "digits-0020.json"]
    assert len(names) == 10


def test_a_share_is_held_out_by_its_images(tmp_path: Path) -> None:
    # Two questions about each of 40 images, and 40 without one.
    pictures = [tiny_sample(index, images={"0.png": tiny_sample(index % 40).images["0.png"]}) for index in range(80)]
    texts = [
        tiny_sample(index, images={}, messages=({"role": "user", "content": f"What is {index} + 1?"},))
        for index in range(80, 120)
    ]
    samples = [*pictures, *texts]
    trained, held_out = write_split_shards(samples, tmp_path / "train", tmp_path / "heldout", 0.25, 1000)
    assert trained + held_out == 120
    assert 15 < held_out < 45
    assert sum(check_shards(tmp_path / "train").values()) == trained
    with tarfile.open(tmp_path / "heldout/shard-000000.tar") as tar:
        keys = {name.partition(".")[0] for name in tar.getnames()}
    assert keys == {sample.key for sample in samples if is_held_out(sample, 0.25)}
    assert {key for key in keys if key < "digits-0040"} == {
        f"digits-{int(key[-4:]) - 40:04d}" for key in keys if "digits-0040" <= key < "digits-0080"
    }
    assert any(key >= "digits-0080" for key in keys)
    # A larger share holds the smaller one.
    assert all(is_held_out(sample, 0.5) for sample in samples if is_held_out(sample, 0.25))


def test_nothing_is_left_where_a_part_is_empty_or_bad(tmp_path: Path) -> None:
    for share, empty in ((1e-9, "heldout"), (1 - 1e-9, "train")):
        with pytest.raises(ValueError, match=rf"no samples to write to .*{empty}: of 3, "):
            write_split_shards(map(tiny_sample, range(3)), tmp_path / "train", tmp_path / "heldout", share)
    with pytest.raises(SampleError, match="occurs twice"):
        write_split_shards([tiny_sample(0)] * 2, tmp_path / "train", tmp_path / "heldout", 0.5)
    with pytest.raises(ValueError, match="samples_per_shard is 0"):
        write_split_shards([], tmp_path / "train", tmp_path / "heldout", 0.5, 0)
    assert list(tmp_path.iterdir()) == []


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    first, second = tiny_shards(tmp_path / "a", 12), tiny_shards(tmp_path / "b%d", 12)
    for name in ("shard-000000.tar", "shard-000001.tar", "shard-000001.tar.idx"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_energon_itself_reads_the_folder(tmp_path: Path) -> None:
    folder = tiny_shards(tmp_path / "data", 12)
    dataset = get_train_dataset(
        folder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=RawEncoder(),
        repeat=False,
    )
    keys = sorted(sample.__key__ for sample in get_loader(dataset, watchdog_timeout_seconds=None))
    assert keys == [f"digits-{index:04d}" for index in range(12)]


class HeldByThreads:
    """Like a process group of gloo: only the process that made it can delete it."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.itself = self

    def __del__(self) -> None:
        while os.getpid() != self.process:
            time.sleep(1)


@pytest.mark.timeout(60)
def test_the_process_that_energon_forks_meets_no_garbage_of_ours(tmp_path: Path) -> None:
    HeldByThreads()
    collections = iter([(1, 1, 1)])
    # A hook cannot be taken back: this one acts on one fork only.
    os.register_at_fork(after_in_child=lambda: gc.set_threshold(*next(collections, gc.get_threshold())))
    threshold = gc.get_threshold()
    gc.set_threshold(0)
    try:
        assert check_shards(tiny_shards(tmp_path / "data", 3)) == {"shard-000000.tar": 3}
    finally:
        gc.set_threshold(*threshold)
        next(collections, None)


def test_nothing_is_left_after_a_bad_sample(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="digits-0000.*twice"):
        write_shards([tiny_sample(0), tiny_sample(0)], tmp_path / "data")
    with pytest.raises(SampleError, match="digits-0001"):
        write_shards([tiny_sample(0), tiny_sample(1, answer="", response=None)], tmp_path / "data")
    with pytest.raises(ValueError, match="no samples"):
        write_shards([], tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    folder = tiny_shards(tmp_path / "data", 1)
    with pytest.raises(ValueError, match="exists already"):
        write_shards([tiny_sample(5)], folder)
    assert check_shards(folder) == {"shard-000000.tar": 1}


def test_incomplete_data_sets_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a prepared data set"):
        check_shards(tmp_path)
    folder = tiny_shards(tmp_path / "data", 15)
    shard = folder / "shard-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:5000])
    with pytest.raises(ValueError, match=r"shard-000001\.tar is truncated: 5000 bytes of at least"):
        check_shards(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.tar is missing"):
        check_shards(folder)
    shard.write_bytes(content)
    check_shards(folder)
    (folder / "shard-000001.tar.idx").write_bytes(b"123")
    with pytest.raises(ValueError, match="is damaged: 3 bytes"):
        check_shards(folder)
    for counts in ("{}", '{"shard-000000.tar": 0}'):
        (folder / ".nv-meta" / ".info.json").write_text(f'{{"shard_counts": {counts}}}')
        with pytest.raises(ValueError, match=r"data has no samples \(.*info.json lists none\)"):
            check_shards(folder)
    (folder / ".nv-meta" / ".info.json").write_text('{"shard_counts": [1]}')
    with pytest.raises(ValueError, match="is damaged"):
        check_shards(folder)
    (folder / ".nv-meta" / ".info.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        check_shards(folder)
