"""Conversions whose sources, disk or earlier output are not as they should be."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_r1v2.checkpoint import conversion, destinations
from megatron_r1v2.checkpoint.conversion import RunOptions
from megatron_r1v2.checkpoint.destinations import (
    HfConversion,
    HfFormat,
    TorchDistConversion,
    write_checkpoint,
    write_hf,
)
from megatron_r1v2.checkpoint.megatron.torch_dist import METADATA
from megatron_r1v2.checkpoint.sources import CheckpointSpec, HfSpec
from tests.checkpoint import interrupted
from tests.checkpoint.damage import files_below, fresh, weight_files
from tests.tiny_hf import tiny_hf_model, tiny_text_config, tiny_vision_config

FILE_BYTES = 10_000


@pytest.fixture
def model(tmp_path) -> Path:
    """A very small model, which the test may change."""
    vision = tiny_vision_config("6b", heads=2, head_size=4, layers=2, image_size=16, patch=4)
    tiny_hf_model(tmp_path / "hf", "6b", vision=vision, text=tiny_text_config(hidden=16, heads=2, kv_heads=1, layers=1))
    return tmp_path / "hf"


def write(model: Path, output: Path, *, kind: type = HfConversion, overwrite: bool = False, **options) -> None:
    run = RunOptions(workers=1, quiet=True, overwrite=overwrite)
    if kind is HfConversion:
        job = HfConversion(HfSpec(model), (model,), HfFormat("chat", max_shard_bytes=FILE_BYTES, **options))
        write_hf(job, output, companions=model, options=run)
    else:
        dist = TorchDistConversion(HfSpec(model), (model,), max_file_bytes=FILE_BYTES, **options)
        write_checkpoint(dist, output, companions=model, options=run)


@pytest.mark.parametrize("kind", [HfConversion, TorchDistConversion])
def test_a_source_that_changes_meanwhile_gives_no_output(model, tmp_path, monkeypatch, kind):
    original, written = kind.write, []
    path = model / "model.safetensors"

    def replacing(self, file, folder, wrote):
        if len(written) == 1:
            save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, model / "new")
            (model / "new").replace(path)
        written.append(file.name)
        return original(self, file, folder, wrote)

    monkeypatch.setattr(kind, "write", replacing)
    with pytest.raises(ValueError, match=f"{path} was changed while it was read"):
        write(model, tmp_path / "out", kind=kind)
    assert len(written) <= 3  # it is seen at once, by when the worker may have begun another
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_configuration_that_changes_at_the_end_gives_no_output(model, tmp_path, monkeypatch):
    original = destinations.write_manifest

    def changing(*arguments, **options):
        original(*arguments, **options)
        config = model / "config.json"
        config.write_text(config.read_text() + " ")

    monkeypatch.setattr(destinations, "write_manifest", changing)
    with pytest.raises(ValueError, match=r"config\.json was changed while it was read"):
        write(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def change(model: Path, name: str, made: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {name: made(tensors[name])}, model / "model.safetensors")


def test_layers_of_several_dtypes_are_refused_where_they_share_an_array(model, tmp_path):
    second = "vision_tower.encoder.layer.1.lambda_1"
    change(model, second, torch.Tensor.half)
    told = r"layers\.0\.attention_scale is torch\.float32 .* and .*1\.attention_scale is torch\.float16 .* give --dtype"
    with pytest.raises(ValueError, match=told):
        write(model, tmp_path / "out", kind=TorchDistConversion)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    write(model, tmp_path / "out", kind=TorchDistConversion, dtype="fp32")
    with CheckpointSpec(tmp_path / "out").open() as got, HfSpec(model).open() as source:
        ours = "vision.decoder.layers.1.attention_scale"
        assert torch.equal(got.parameter(ours), source.parameter(ours).float())


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_an_output_that_a_source_leads_to_is_refused(model, tmp_path, name):
    """A folder of links, as download caches make them, whose files are in the output."""
    (tmp_path / "kept").mkdir()
    kept = (model / name).rename(tmp_path / "kept" / name)
    (model / name).symlink_to(kept)
    content = kept.read_bytes()
    with pytest.raises(ValueError, match=f"{name} leads into the output"):
        write(model, tmp_path / "kept", overwrite=True)
    assert kept.read_bytes() == content
    write(model, tmp_path / "out")


@pytest.mark.parametrize("kind", [HfConversion, TorchDistConversion])
def test_a_dtype_that_would_make_weights_infinite_is_refused(model, tmp_path, kind):
    name = "language_model.model.layers.0.self_attn.o_proj.weight"
    change(model, name, lambda tensor: tensor.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(-70_000.0)))
    told = r"language.*0\.self_attention\.linear_proj\.weight reaches 7e\+04.*--dtype=fp16.*accepted: fp32, bf16"
    with pytest.raises(ValueError, match=told):
        write(model, tmp_path / "out", kind=kind, dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    write(model, tmp_path / "out", kind=kind, dtype="bf16")


def test_what_is_infinite_in_the_source_stays_so(model, tmp_path):
    name = "language_model.model.norm.weight"
    change(model, name, lambda tensor: tensor * torch.tensor([torch.inf, -torch.inf, torch.nan, 1]).repeat(4))
    write(model, tmp_path / "out", dtype="fp16")
    with HfSpec(tmp_path / "out").open() as got, HfSpec(model).open() as source:
        ours = "language.decoder.final_layernorm.weight"
        assert torch.equal(got.parameter(ours).nan_to_num(), source.parameter(ours).half().nan_to_num())


@pytest.mark.parametrize("kind", [HfConversion, TorchDistConversion])
def test_a_continued_run_needs_no_room_for_what_it_writes_again(model, tmp_path, monkeypatch, kind):
    """The disk holds one output and no more; the run is stopped when the bytes of its last file are there."""
    write(model, tmp_path / "straight", kind=kind)
    size, partial = bytes_below(tmp_path / "straight"), tmp_path / ".out.partial"
    with monkeypatch.context() as patched:
        patched.setattr(conversion, "_SPARE_BYTES", 0)
        free = lambda _: shutil._ntuple_diskusage(size, 0, size - bytes_below(partial))  # noqa: E731
        patched.setattr(shutil, "disk_usage", free)
        stop_after(kind, 3, patched)
        with pytest.raises(OSError, match="the power is gone"):
            write(model, tmp_path / "out", kind=kind)
    with monkeypatch.context() as patched:
        patched.setattr(conversion, "_SPARE_BYTES", 0)
        patched.setattr(shutil, "disk_usage", free)
        write(model, tmp_path / "out", kind=kind)
    assert same_files(tmp_path / "straight", tmp_path / "out")


@pytest.mark.parametrize("kind", [HfConversion, TorchDistConversion])
@pytest.mark.parametrize("place", [3, -300, -5])
def test_a_continued_run_writes_again_what_was_damaged_meanwhile(model, tmp_path, monkeypatch, kind, place):
    """One bit of a finished file, of the same size: in its header, its tensors or at its end."""
    write(model, tmp_path / "straight", kind=kind)
    with monkeypatch.context() as patched:
        stop_after(kind, 3, patched)
        with pytest.raises(OSError, match="the power is gone"):
            write(model, tmp_path / "out", kind=kind)
    partial = tmp_path / ".out.partial"
    finished = sorted([*partial.glob("*.safetensors"), *partial.glob("tensors/*.distcp")])
    content = bytearray(finished[0].read_bytes())
    content[place] ^= 1
    finished[0].write_bytes(content)
    untouched = finished[1].stat().st_mtime_ns
    write(model, tmp_path / "out", kind=kind)
    assert same_files(tmp_path / "straight", tmp_path / "out")
    assert (tmp_path / "out" / finished[1].relative_to(partial)).stat().st_mtime_ns == untouched


@pytest.mark.parametrize("kind", [HfConversion, TorchDistConversion])
def test_what_is_beside_the_weights_is_made_before_them(model, tmp_path, monkeypatch, kind):
    def failing(*_):
        raise ValueError("no tokenizer here")

    with monkeypatch.context() as patched:
        patched.setattr(destinations, "make_companions", failing)
        patched.setattr(kind, "write", lambda *_: pytest.fail("weights are written"))
        with pytest.raises(ValueError, match="no tokenizer here"):
            write(model, tmp_path / "out", kind=kind)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    # What an interrupted run has written is not lost by it.
    with monkeypatch.context() as patched:
        stop_after(kind, 3, patched)
        with pytest.raises(OSError, match="the power is gone"):
            write(model, tmp_path / "out", kind=kind)
    with monkeypatch.context() as patched:
        patched.setattr(destinations, "make_companions", failing)
        with pytest.raises(ValueError, match="no tokenizer here"):
            write(model, tmp_path / "out", kind=kind)
    assert bytes_below(tmp_path / ".out.partial") > 0
    write(model, tmp_path / "out", kind=kind)


def stop_after(kind: type, count: int, monkeypatch) -> None:
    """Let a run end when so many files are written, the last of them without a record."""
    original, written = kind.write, []

    def failing(self, file, folder, wrote):
        record = original(self, file, folder, wrote)
        written.append(file.name)
        if len(written) == count:
            raise OSError(5, "the power is gone")
        return record

    monkeypatch.setattr(kind, "write", failing)


def contents_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def bytes_below(folder: Path) -> int:
    """Of weights."""
    return sum(len(data) for name, data in contents_below(folder).items() if name.endswith((".safetensors", ".distcp")))


def same_files(one: Path, two: Path) -> bool:
    return contents_below(one) == contents_below(two)


ONE_AT_A_TIME = RunOptions(workers=1, quiet=True)


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
    return conversion._begin(job, partial, job.output_files(), conversion._stamps(job.source.files()))


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
