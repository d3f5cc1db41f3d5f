"""What a conversion does when sources, disk and what it has written already are not as they should be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
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
from megatron_r1v2.checkpoint.sources import CheckpointSpec, HfSpec
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

    def changing(*arguments):
        original(*arguments)
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


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def bytes_below(folder: Path) -> int:
    """Of weights."""
    return sum(len(data) for name, data in files_below(folder).items() if name.endswith((".safetensors", ".distcp")))


def same_files(one: Path, two: Path) -> bool:
    return files_below(one) == files_below(two)
