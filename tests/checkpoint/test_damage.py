"""Damaged, hostile and interrupted: never an output that looks finished, always an error in words."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from checkpoint_tools import hf_to_hf, hf_to_megatron, megatron_to_hf
from megatron_r1v2.checkpoint import conversion as jobs
from megatron_r1v2.checkpoint.conversion import RunOptions
from megatron_r1v2.checkpoint.destinations import HfJob, write_hf
from megatron_r1v2.checkpoint.hf.safetensors_files import map_safetensors_file
from megatron_r1v2.checkpoint.manifest import MANIFEST, sha256
from megatron_r1v2.checkpoint.megatron.torch_dist import METADATA, TorchDist
from megatron_r1v2.checkpoint.sources import CheckpointSpec, HfSpec
from tests.checkpoint import interrupted
from tests.tiny_hf import tiny_hf_model, tiny_text_config, tiny_vision_config

PROPERTY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ONE_AT_A_TIME = RunOptions(workers=1, quiet=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A foreign folder (no checksums), one of ours in several files, and a checkpoint of ours; all very small."""
    root = tmp_path_factory.mktemp("damage")
    vision = tiny_vision_config("6b", heads=2, head_size=4, layers=1, image_size=16, patch=4)
    text = tiny_text_config(hidden=16, heads=2, kv_heads=1, layers=1)
    tiny_hf_model(root / "foreign", "6b", vision=vision, text=text)
    for out in ("ours", "megatron"):
        tool, more = (hf_to_hf, ["--shard-size", "20KB"]) if out == "ours" else (hf_to_megatron, [])
        tool.main(["--hf", str(root / "foreign"), "--output", str(root / out), "--quiet", *more])
    for kind in ("foreign", "ours", "megatron"):
        assert convert(root / kind, root / f"of-{kind}")
    return root


def convert(source: Path, output: Path) -> bool:
    """Convert in whichever direction; return whether it ended well. An error must be one in words."""
    if (source / "tensors").is_dir():
        tool, arguments = megatron_to_hf, ["--checkpoint", str(source)]
    else:
        tool, arguments = hf_to_megatron, ["--hf", str(source)]
    try:
        tool.main([*arguments, "--output", str(output), "--quiet"])
    except SystemExit:
        assert not output.exists()
        assert not output.with_name(f".{output.name}.partial").exists()
        return False
    return True


def what_differs(got: Path, expected: Path) -> list[str]:
    """Name the files of a conversion that are not those of the undamaged source; a last line end may be missing."""
    names = [str(path.relative_to(expected)) for path in files_below(expected) if path.name != MANIFEST]
    assert {path.name for path in files_below(got)} == {path.name for path in files_below(expected)}
    return [name for name in names if (got / name).read_bytes().rstrip() != (expected / name).read_bytes().rstrip()]


def weight_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("tensors/*.distcp"), *folder.glob("tensors/.metadata")])


@pytest.mark.parametrize("kind", ["foreign", "ours", "megatron"])
@PROPERTY
@given(data=st.data())
def test_a_truncated_file_never_gives_an_output(folders, tmp_path, kind, data):
    work = fresh(folders / kind, tmp_path / "work")
    # A text without a checksum says nothing of its end.
    files = [path for path in files_below(work) if kind != "foreign" or path.suffix != ".jinja"]
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    if convert(work, tmp_path / "out"):
        assert path not in weight_files(work)
        assert what_differs(tmp_path / "out", folders / f"of-{kind}") == []
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("kind", ["ours", "megatron"])
@PROPERTY
@given(data=st.data())
def test_a_flipped_bit_never_changes_an_output_where_there_are_checksums(folders, tmp_path, kind, data):
    """Anywhere in any file, tokenizer and manifest included. What comes out in spite of it is right."""
    work = fresh(folders / kind, tmp_path / "work")
    path = data.draw(st.sampled_from(files_below(work)))
    flip(path, data.draw(st.integers(0, 8 * path.stat().st_size - 1)))
    if convert(work, tmp_path / "out"):
        assert what_differs(tmp_path / "out", folders / f"of-{kind}") == []
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("kind", ["foreign", "ours", "megatron"])
@pytest.mark.parametrize("damage", [b"{}", b'{"version": ', b""])
def test_a_damaged_tokenizer_is_refused_before_the_weights_are_written(folders, tmp_path, kind, damage, capsys):
    work = fresh(folders / kind, tmp_path / "work")
    path = next(work.rglob("tokenizer.json"))
    path.write_bytes(damage)
    assert not convert(work, tmp_path / "out")
    assert "tokenizer.json" in capsys.readouterr().err


@PROPERTY
@given(data=st.data())
def test_a_flipped_bit_in_a_checkpoint_of_others_is_found_by_its_crc(folders, tmp_path, data):
    work = fresh(folders / "megatron", tmp_path / "work")
    (work / "checkpoint_manifest.json").unlink()
    path = next((work / "tensors").glob("*.distcp"))
    flip(path, data.draw(st.integers(0, 8 * path.stat().st_size - 1)))
    if convert(work, tmp_path / "out"):
        got, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", folders / "foreign"))
        assert [name for name in expected if not torch.equal(got[name], expected[name])] == []
        shutil.rmtree(tmp_path / "out")


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def fresh(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def header_file(path: Path, header: object, *, data: int = 16, length: int | None = None, raw: bytes = b"") -> Path:
    encoded = raw or json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + bytes(data))
    return path


def entry(start: int, end: int, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"header": {"a": entry(0, 8), "b": entry(4, 12)}, "data": 12}, "overlap"),
        ({"header": {"a": entry(0, 8), "b": entry(12, 20)}, "data": 20}, "gap"),
        ({"header": {"a": entry(0, 8)}, "data": 4}, "end at byte 8 of 4"),
        ({"header": {"a": entry(0, 8)}, "data": 16}, "end at byte 8 of 16"),
        ({"header": {"a": entry(8, 0)}, "data": 8}, "has -8 bytes"),
        ({"header": {"a": entry(-8, 0)}, "data": 8}, "no valid shape"),
        ({"header": {"a": entry(0, 8, (3,))}, "data": 8}, "where shape and dtype make 12"),
        ({"header": {"a": entry(0, 8, (2**62, 2**62))}, "data": 8}, "where shape and dtype make"),
        ({"header": {"a": entry(0, 8, (True, 2))}, "data": 8}, "no valid shape"),
        ({"header": {"a": entry(0, 8, dtype="F31")}, "data": 8}, "no known dtype"),
        ({"header": {"a": entry(0, 8) | {"dtype": []}}, "data": 8}, "no known dtype"),
        ({"header": {"a": entry(0, 0, (0, 2**63))}, "data": 0}, "beyond what any machine counts"),
        ({"header": {"a": entry(0, 0, (0, 2**62, 2**62))}, "data": 0}, "beyond what any machine counts"),
        ({"header": {"a": None}, "data": 8}, "no known dtype"),
        ({"header": [1]}, "no JSON object"),
        ({"header": {}, "raw": b'{"a":' + json.dumps(entry(0, 8)).encode() + b',"a":' + b"1}"}, "in the header twice"),
        ({"header": {}, "raw": b"[" * 100_000}, "cannot be read"),
        ({"header": {}, "raw": b"\xff\xfe{}"}, "cannot be read"),
        ({"header": {"__metadata__": {"a": 1}}}, "__metadata__"),
        ({"header": {}, "length": 2**63}, "announce a header of"),
        ({"header": {}, "length": 10**12}, "announce a header of"),
    ],
)
def test_hostile_headers_are_named(tmp_path, content, told):
    path = header_file(tmp_path / "model.safetensors", **content)
    with pytest.raises(ValueError, match="model.safetensors .*cannot be read") as error:
        map_safetensors_file(path)
    assert told in str(error.value)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch was-run",)


def test_a_pickle_in_metadata_calls_nothing(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work = fresh(folders / "megatron", tmp_path / "work")
    (work / "tensors" / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match="wants to call"):
        TorchDist(work / "tensors")
    assert not (tmp_path / "was-run").exists()


def test_a_pickle_beside_the_tensors_calls_nothing(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    work = fresh(folders / "megatron", tmp_path / "work")
    (work / "checkpoint_manifest.json").unlink()
    torch.save(Hostile(), work / "state.pt")
    assert not convert(work, tmp_path / "out")
    assert "state.pt cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "was-run").exists()


def test_a_shard_that_is_gone_is_named(folders, tmp_path, capsys):
    work = fresh(folders / "ours", tmp_path / "work")
    gone = sorted(work.glob("*.safetensors"))[1]
    gone.unlink()
    assert not convert(work, tmp_path / "out")
    assert f"{gone.name} is missing" in capsys.readouterr().err


def test_manifests_of_the_first_version_are_checked_and_unknown_ones_refused(folders, tmp_path, capsys):
    for kind in ("ours", "megatron"):
        work = fresh(folders / kind, tmp_path / "work")
        content = json.loads((work / "checkpoint_manifest.json").read_text())
        with (HfSpec if kind == "ours" else CheckpointSpec)(work).open() as source:
            read = source._tensor if kind == "ours" else source.parameter
            for name, said in content["tensors"].items():
                del said["xxh3_128"]
                said["sha256"] = sha256(read(name))
        for version, told in ((1, ""), (3, "has version 3")):
            content["version"] = version
            (work / "checkpoint_manifest.json").write_text(json.dumps(content))
            assert convert(work, tmp_path / f"{kind}-{version}") == (version == 1)
            assert told in capsys.readouterr().err
        content["version"] = 1
        name = next(iter(content["tensors"]))
        content["tensors"][name]["sha256"] = "0" * 64
        (work / "checkpoint_manifest.json").write_text(json.dumps(content))
        assert not convert(work, tmp_path / "out")
        assert f"{name} is not what it was" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "told"), [("../secret", "accepted: files beside it"), ("gone", "is missing")])
def test_metadata_may_name_only_files_beside_it(folders, tmp_path, name, told):
    work = fresh(folders / "megatron", tmp_path / "work")
    path = work / "tensors" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = name
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=told):
        TorchDist(work / "tensors")


def test_parts_of_an_array_must_tile_it(folders, tmp_path):
    work = fresh(folders / "megatron", tmp_path / "work")
    path = work / "tensors" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    array = metadata.state_dict_metadata["adapter.linear_fc1.weight"]
    array.size = torch.Size([array.size[0] + 1, array.size[1]])
    path.write_bytes(pickle.dumps(metadata))
    assert not convert(work, tmp_path / "out")


def hf_job(folders: Path, **options) -> HfJob:
    return HfJob(HfSpec(folders / "foreign"), "chat", (folders / "foreign",), max_shard_bytes=20_000, **options)


def test_an_interrupted_conversion_goes_on_where_it_stopped(folders, tmp_path, monkeypatch):
    companions = folders / "foreign"
    write_hf(hf_job(folders), tmp_path / "straight", companions=companions, options=ONE_AT_A_TIME)
    written: list[str] = []
    original = HfJob.write

    def failing(self, piece, folder, wrote):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(piece.name)
        return original(self, piece, folder, wrote)

    monkeypatch.setattr(HfJob, "write", failing)
    with pytest.raises(OSError, match="No space"):
        write_hf(hf_job(folders), tmp_path / "out", companions=companions, options=ONE_AT_A_TIME)
    assert not (tmp_path / "out").exists()
    partial = tmp_path / ".out.partial"
    assert not (partial / "config.json").exists()
    times = {name: (partial / name).stat().st_mtime_ns for name in written}
    half_written = next(piece.name for piece in hf_job(folders).pieces() if piece.name not in written)
    (partial / half_written).write_bytes(b"half")
    monkeypatch.setattr(HfJob, "write", original)
    write_hf(hf_job(folders), tmp_path / "out", companions=companions, options=ONE_AT_A_TIME)
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in written} == times
    one, two = (sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("straight", "out"))
    assert one == two
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "straight" / n).read_bytes() for n in one)


def test_another_conversion_does_not_go_on_with_the_files_of_the_first(folders, tmp_path, monkeypatch):
    original = HfJob.write

    def failing(self, piece, folder, wrote):
        if list(folder.glob("*.safetensors")):
            raise KeyboardInterrupt
        return original(self, piece, folder, wrote)

    for change in ("options", "source"):
        source = fresh(folders / "foreign", tmp_path / "source")
        job = HfJob(HfSpec(source), "chat", (source,), max_shard_bytes=20_000)
        monkeypatch.setattr(HfJob, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            write_hf(job, tmp_path / "out", companions=source, options=ONE_AT_A_TIME)
        monkeypatch.setattr(HfJob, "write", original)
        assert len(begun(job, tmp_path / ".out.partial")) == 1  # unchanged, it would go on
        if change == "options":
            job = HfJob(HfSpec(source), "chat", (source,), max_shard_bytes=20_000, dtype="bf16")
        else:
            time.sleep(0.01)
            tiny = load_file(source / "model.safetensors")
            save_file({name: tensor + 1 for name, tensor in tiny.items()}, source / "model.safetensors")
        assert begun(job, tmp_path / ".out.partial") == {}, change
        shutil.rmtree(tmp_path / ".out.partial")


def begun(job: HfJob, partial: Path) -> dict:
    """The records that a run would take over."""
    return jobs._begin(job, partial, job.pieces(), jobs._stamps(job.sources()))


def test_two_conversions_to_one_place_do_not_mix(folders, tmp_path, monkeypatch):
    original = HfJob.write
    options = {"companions": folders / "foreign", "options": ONE_AT_A_TIME}

    def meanwhile(self, piece, folder, wrote):
        monkeypatch.setattr(HfJob, "write", original)
        with pytest.raises(ValueError, match="another process is writing"):
            write_hf(hf_job(folders), tmp_path / "out", **options)
        return original(self, piece, folder, wrote)

    monkeypatch.setattr(HfJob, "write", meanwhile)
    write_hf(hf_job(folders), tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_source_stops_the_files_that_are_under_way(folders, tmp_path, monkeypatch):
    original, ends = HfJob.write, []

    def endless_but_for_the_first(self, piece, folder, wrote):
        if piece.name.startswith("model-00001"):
            raise ValueError("it is damaged")
        with contextlib.suppress(CancelledError):
            for _ in range(3000):
                wrote(1)
                time.sleep(0.01)
            ends.append(piece.name)
        return original(self, piece, folder, wrote)

    monkeypatch.setattr(HfJob, "write", endless_but_for_the_first)
    with pytest.raises(ValueError, match="it is damaged"):
        write_hf(hf_job(folders), tmp_path / "out", companions=folders / "foreign", options=RunOptions(2, quiet=True))
    assert ends == []
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_before_anything_is_written(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 60_000_000))
    with pytest.raises(ValueError, match=r"GB left; free some"):
        write_hf(hf_job(folders), tmp_path / "out", companions=folders / "foreign", options=ONE_AT_A_TIME)
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / ".out.partial").glob("*.safetensors")) == []


@pytest.mark.slow
@pytest.mark.parametrize("way", ["in", "out"])
def test_a_killed_run_leaves_nothing_that_looks_finished_and_ends_with_the_same_bytes(folders, tmp_path, way):
    """SIGKILL at random moments of two workers, each time later; then the same command runs to its end."""
    source = folders / ("foreign" if way == "in" else "megatron")
    interrupted.convert(way, source, tmp_path / "straight")
    num_files = len(weight_files(tmp_path / "straight"))
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    command = [sys.executable, "-m", "tests.checkpoint.interrupted", way, str(source), str(out)]
    chance = random.Random(way)
    for kill in range(1, 4):
        process = subprocess.Popen(command)
        while process.poll() is None and len(finished_files(partial)) < kill * num_files // 5:
            time.sleep(0.001)
        time.sleep(0.01 * chance.random())
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not out.exists()
        assert [*partial.glob("[!.]*/config.json"), *partial.glob("config.json"), *partial.rglob(METADATA)] == []
    assert len(finished_files(partial)) >= 3 * num_files // 5
    interrupted.convert(way, source, out)
    straight = {path.relative_to(tmp_path / "straight"): path for path in files_below(tmp_path / "straight")}
    assert {path.relative_to(out) for path in files_below(out)} == set(straight)
    assert [name for name, path in straight.items() if (out / name).read_bytes() != path.read_bytes()] == []


def finished_files(partial: Path) -> list[Path]:
    return [path for path in partial.glob(".progress/*.json") if path.name != "job.json"]


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
