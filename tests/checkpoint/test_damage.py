"""Damaged, hostile and interrupted: never an output that looks finished, always an error in words."""

from __future__ import annotations

import contextlib
import dataclasses
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
from megatron_r1v2.checkpoint import conversion
from megatron_r1v2.checkpoint.conversion import RunOptions
from megatron_r1v2.checkpoint.destinations import HfConversion, HfFormat, write_hf
from megatron_r1v2.checkpoint.hf.safetensors_files import map_safetensors_file
from megatron_r1v2.checkpoint.manifest import MANIFEST
from megatron_r1v2.checkpoint.megatron.torch_dist import METADATA, TorchDist
from megatron_r1v2.checkpoint.sources import HfSpec
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


@pytest.mark.parametrize("kind", ["ours", "megatron"])
@pytest.mark.parametrize(
    ("version", "told"), [(1, "an earlier development version"), (2, "convert or train again"), (4, "has version 4")]
)
def test_manifests_of_other_versions_are_refused(folders, tmp_path, capsys, kind, version, told):
    work = fresh(folders / kind, tmp_path / "work")
    content = json.loads((work / MANIFEST).read_text())
    (work / MANIFEST).write_text(json.dumps({**content, "version": version}))
    assert not convert(work, tmp_path / "out")
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["ours", "megatron"])
def test_a_tensor_that_differs_from_the_manifest_is_named(folders, tmp_path, capsys, kind):
    work = fresh(folders / kind, tmp_path / "work")
    content = json.loads((work / MANIFEST).read_text())
    name = next(iter(content["tensors"]))
    content["tensors"][name]["xxh3_128"] = "0" * 32
    (work / MANIFEST).write_text(json.dumps(content))
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


def hf_job(folders: Path, **options) -> HfConversion:
    source = folders / "foreign"
    return HfConversion(HfSpec(source), (source,), HfFormat("chat", max_shard_bytes=20_000, **options))


def test_an_interrupted_conversion_goes_on_where_it_stopped(folders, tmp_path, monkeypatch):
    companions = folders / "foreign"
    write_hf(hf_job(folders), tmp_path / "straight", companions=companions, options=ONE_AT_A_TIME)
    written: list[str] = []
    original = HfConversion.write

    def failing(self, file, folder, wrote):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(file.name)
        return original(self, file, folder, wrote)

    monkeypatch.setattr(HfConversion, "write", failing)
    with pytest.raises(OSError, match="No space"):
        write_hf(hf_job(folders), tmp_path / "out", companions=companions, options=ONE_AT_A_TIME)
    assert not (tmp_path / "out").exists()
    partial = tmp_path / ".out.partial"
    assert not (partial / "config.json").exists()
    times = {name: (partial / name).stat().st_mtime_ns for name in written}
    half_written = next(file.name for file in hf_job(folders).output_files() if file.name not in written)
    (partial / half_written).write_bytes(b"half")
    monkeypatch.setattr(HfConversion, "write", original)
    write_hf(hf_job(folders), tmp_path / "out", companions=companions, options=ONE_AT_A_TIME)
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in written} == times
    one, two = (sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("straight", "out"))
    assert one == two
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "straight" / n).read_bytes() for n in one)


def test_another_conversion_does_not_go_on_with_the_files_of_the_first(folders, tmp_path, monkeypatch):
    original = HfConversion.write

    def failing(self, file, folder, wrote):
        if list(folder.glob("*.safetensors")):
            raise KeyboardInterrupt
        return original(self, file, folder, wrote)

    for change in ("options", "source"):
        source = fresh(folders / "foreign", tmp_path / "source")
        job = HfConversion(HfSpec(source), (source,), HfFormat("chat", max_shard_bytes=20_000))
        monkeypatch.setattr(HfConversion, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            write_hf(job, tmp_path / "out", companions=source, options=ONE_AT_A_TIME)
        monkeypatch.setattr(HfConversion, "write", original)
        assert len(begun(job, tmp_path / ".out.partial")) == 1  # unchanged, it would go on
        if change == "options":
            job = dataclasses.replace(job, form=dataclasses.replace(job.form, dtype="bf16"))
        else:
            time.sleep(0.01)
            tiny = load_file(source / "model.safetensors")
            save_file({name: tensor + 1 for name, tensor in tiny.items()}, source / "model.safetensors")
        assert begun(job, tmp_path / ".out.partial") == {}, change
        shutil.rmtree(tmp_path / ".out.partial")


def begun(job: HfConversion, partial: Path) -> dict:
    """The records that a run would take over."""
    return conversion._begin(job, partial, job.output_files(), conversion._stamps(job.source_files()))


def test_two_conversions_to_one_place_do_not_mix(folders, tmp_path, monkeypatch):
    original = HfConversion.write
    options = {"companions": folders / "foreign", "options": ONE_AT_A_TIME}

    def meanwhile(self, file, folder, wrote):
        monkeypatch.setattr(HfConversion, "write", original)
        with pytest.raises(ValueError, match="another process is writing"):
            write_hf(hf_job(folders), tmp_path / "out", **options)
        return original(self, file, folder, wrote)

    monkeypatch.setattr(HfConversion, "write", meanwhile)
    write_hf(hf_job(folders), tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_source_stops_the_files_that_are_under_way(folders, tmp_path, monkeypatch):
    original, ends = HfConversion.write, []

    def endless_but_for_the_first(self, file, folder, wrote):
        if file.name.startswith("model-00001"):
            raise ValueError("it is damaged")
        with contextlib.suppress(CancelledError):
            for _ in range(3000):
                wrote(1)
                time.sleep(0.01)
            ends.append(file.name)
        return original(self, file, folder, wrote)

    monkeypatch.setattr(HfConversion, "write", endless_but_for_the_first)
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
    return [path for path in partial.glob(".progress/*.json") if path.name != "conversion.json"]


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
