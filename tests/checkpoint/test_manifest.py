"""Manifests: read by their own version alone, compared with tensors and files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import xxhash

from checkpoint_tools import verify
from megatron_r1v2.checkpoint.hf.folders import read_json
from megatron_r1v2.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    entry_info,
    file_entries,
    file_entry,
    listed_files,
    tensor_entry,
    write_manifest,
)
from megatron_r1v2.checkpoint.tensor_files import digest_of, tensor_info
from tests.checkpoint.damage import convert, flip, fresh, run


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


def test_changed_files_are_found(made, tmp_path, capsys):
    shutil.copytree(made / "chat", tmp_path / "chat")
    (tmp_path / "chat" / "tokenizer.json").write_text("{}")
    run(verify, tmp_path / "chat", code=1)
    assert "tokenizer.json is not what it was" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"tensors": [1]}, {"tensors": {"a": 1}}, {"files": 5}, {"files": {}}])
def test_a_manifest_that_is_none_is_refused(made, tmp_path, capsys, change):
    shutil.copytree(made / "chat", tmp_path / "chat")
    path = tmp_path / "chat" / "checkpoint_manifest.json"
    path.write_text(json.dumps({**read_json(path), **change}))
    run(verify, tmp_path / "chat", code=1)
    assert "checkpoint_manifest.json is damaged" in capsys.readouterr().err


def checkpoint(folder: Path) -> Path:
    (folder / "tensors").mkdir(parents=True)
    (folder / "tensors" / "__0_0.distcp").write_bytes(bytes(range(100)))
    (folder / "state.pt").write_bytes(b"state")
    return folder


def test_all_files_of_a_run_are_read_only_when_asked(tmp_path):
    folder = checkpoint(tmp_path / "step")
    write_manifest(folder, {str(path.relative_to(folder)): file_entry(path) for path in listed_files(folder)})
    manifest = Manifest(folder)
    assert manifest.files["state.pt"] == {"bytes": 5, "xxh3_128": xxhash.xxh3_128_hexdigest(b"state")}
    manifest.check_files(weights=True)
    flip(folder / "tensors" / "__0_0.distcp", 7)
    manifest.check_files()
    assert manifest.find_damage("tensors/__0_0.distcp", read=False) is None
    told = "tensors/__0_0.distcp has other content than when it was written"
    assert manifest.find_damage("tensors/__0_0.distcp") == told
    with pytest.raises(ValueError, match=r"__0_0.distcp is not what it was"):
        manifest.check_files(weights=True)
    (folder / "state.pt").write_bytes(b"states")
    assert manifest.find_damage("state.pt") == "state.pt has 6 bytes instead of 5"
    (folder / "state.pt").unlink()
    assert manifest.find_damage("state.pt") == "state.pt is missing"


def test_weights_of_a_conversion_are_known_by_their_tensors_and_progress_is_left_out(tmp_path):
    folder = checkpoint(tmp_path / "out")
    (folder / ".progress").mkdir()
    (folder / ".progress" / "conversion.json").write_text("{}")
    entries = file_entries(folder)
    assert entries["tensors/__0_0.distcp"] == {"bytes": 100}
    assert sorted(entries) == ["state.pt", "tensors/__0_0.distcp"]
    tensor = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    entry = tensor_entry(tensor_info(tensor), digest_of(tensor))
    assert entry == {"dtype": "int16", "shape": [2, 3], "xxh3_128": xxhash.xxh3_128_hexdigest(tensor.numpy().tobytes())}
    assert entry_info(entry) == tensor_info(tensor)
    write_manifest(folder, entries, {"a": entry})
    manifest = Manifest.of(folder)
    manifest.check_tensor("a", tensor)
    for changed in (tensor + 1, tensor.reshape(3, 2), tensor.int()):
        with pytest.raises(ValueError, match="a is not what it was when it was written"):
            manifest.check_tensor("a", changed)
    with pytest.raises(ValueError, match="has no 'b'"):
        manifest.check_tensor("b", tensor)
    assert Manifest.of(tmp_path) is None


def test_a_checksum_whose_name_is_damaged_is_not_skipped(tmp_path):
    folder = checkpoint(tmp_path / "step")
    write_manifest(folder, {"state.pt": file_entry(folder / "state.pt")})
    path = folder / MANIFEST
    path.write_text(path.read_text().replace("xxh3_128", "xxh3_129"))
    with pytest.raises(ValueError, match="is damaged: it says .* of state.pt"):
        Manifest(folder)
