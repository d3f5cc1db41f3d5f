"""Folders on disk: what is broken is named, and what is interrupted never looks finished."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_r1v2.checkpoint.hf.folders import (
    SafetensorsFolder,
    check_output,
    read_json,
    write_hf_folder,
    write_json,
    write_safetensors,
)

TENSORS = {f"layer.{n}.weight": torch.randn(16, 16, generator=torch.Generator().manual_seed(n)) for n in range(6)}


@pytest.fixture
def base(tmp_path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    write_json(folder / "config.json", {"model_type": "internvl", "torch_dtype": "bfloat16", "auto_map": {"A": "b.C"}})
    for name in ("tokenizer.json", "generation_config.json", "preprocessor_config.json"):
        write_json(folder / name, {"from": name})
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "modeling_remote.py").write_text("raise SystemExit('remote code ran')")
    (folder / "tokenizer_remote.py").write_text("raise SystemExit('remote code ran')")
    write_safetensors(folder, TENSORS.items(), max_shard_bytes=3000)
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    with SafetensorsFolder(folder) as opened:
        return {name: opened.tensor(name) for name in opened.names()}


@pytest.mark.parametrize(("max_shard_bytes", "num_files"), [(10**9, 1), (3000, 3), (2048, 3), (2047, 6), (1, 6)])
def test_written_tensors_are_read_back(tmp_path, max_shard_bytes, num_files):
    write_safetensors(tmp_path, TENSORS.items(), max_shard_bytes=max_shard_bytes)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) == num_files
    if num_files > 1:
        assert files[0] == f"model-00001-of-{num_files:05d}.safetensors"
        assert read_json(tmp_path / "model.safetensors.index.json")["metadata"]["total_size"] == 6 * 1024
    again = read(tmp_path)
    assert again.keys() == TENSORS.keys()
    assert all(torch.equal(again[name], TENSORS[name]) for name in TENSORS)


def test_views_of_one_storage_are_written(tmp_path):
    whole = torch.arange(12.0).reshape(4, 3)
    write_safetensors(tmp_path, [("a", whole[:2]), ("b", whole[2:]), ("c", whole.T), ("d", whole[1:3])])
    again = read(tmp_path)
    assert torch.equal(torch.cat([again["a"], again["b"]]), whole)
    assert torch.equal(again["c"], whole.T)
    assert torch.equal(again["d"], whole[1:3])  # overlaps a and b


def test_a_name_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'a' is written twice"):
        write_safetensors(tmp_path, [("a", torch.zeros(1)), ("a", torch.zeros(1))])


def test_missing_shard_is_named(base):
    (base / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors is missing"):
        SafetensorsFolder(base)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_shard_is_named(base, keep):
    path = base / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model-00003-of-00003\.safetensors .*truncated"):
        SafetensorsFolder(base)


@pytest.mark.parametrize(
    "content", [b"<html>not found</html>" * 9, b"\xff" * 64, b"version https://git-lfs.github.com"]
)
def test_wrong_header_is_named(base, content):
    (base / "model-00001-of-00003.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model-00001-of-00003\.safetensors .*cannot be read"):
        SafetensorsFolder(base)


def test_index_and_shards_must_agree(base):
    index = read_json(base / "model.safetensors.index.json")
    promised = json.loads(json.dumps(index))
    promised["weight_map"]["layer.9.weight"] = "model-00001-of-00003.safetensors"
    write_json(base / "model.safetensors.index.json", promised)
    with pytest.raises(ValueError, match=r"model-00001-of-00003\.safetensors lacks layer\.9\.weight"):
        SafetensorsFolder(base)
    save_file({"stale": torch.zeros(1), **TENSORS}, base / "model-00001-of-00003.safetensors")
    with pytest.raises(ValueError, match="another file of the folder holds too"):
        SafetensorsFolder(base)
    del index["weight_map"]["layer.5.weight"]
    write_json(base / "model.safetensors.index.json", index)
    write_safetensors_again(base)
    with pytest.raises(ValueError, match=r"layer\.5\.weight.*does not list"):
        SafetensorsFolder(base)


def write_safetensors_again(base: Path) -> None:
    names = list(TENSORS)
    for number in range(3):
        chosen = {name: TENSORS[name] for name in names[2 * number : 2 * number + 2]}
        save_file(chosen, base / f"model-{number + 1:05d}-of-00003.safetensors")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "model.bin", 3])
def test_index_may_name_only_its_own_shards(base, name):
    write_json(base / "model.safetensors.index.json", {"weight_map": {"a": name}})
    with pytest.raises(ValueError, match="names the shard"):
        SafetensorsFolder(base)


def test_pickles_are_never_read(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        SafetensorsFolder(tmp_path)


def test_export_takes_companions_but_no_code(base, tmp_path):
    write_hf_folder(tmp_path / "out", base=base, tensors=TENSORS.items())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
    }
    assert read_json(tmp_path / "out" / "config.json") == {"model_type": "internvl", "dtype": "float32"}


def test_export_never_replaces_without_being_told(base, tmp_path):
    output = tmp_path / "out"
    write_hf_folder(output, base=base, tensors=TENSORS.items())
    with pytest.raises(ValueError, match="--overwrite"):
        write_hf_folder(output, base=base, tensors=TENSORS.items())
    other = {name: tensor + 1 for name, tensor in TENSORS.items()}
    write_hf_folder(output, base=base, tensors=other.items(), overwrite=True)
    assert torch.equal(read(output)["layer.0.weight"], other["layer.0.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


@pytest.mark.parametrize("output", ["base", "base/.", "base/inside", "."])
def test_source_as_destination_is_refused_even_with_overwrite(base, tmp_path, output):
    with pytest.raises(ValueError, match="one folder or one inside the other"):
        check_output(tmp_path / output, sources=[base], overwrite=True)


def test_source_through_a_link_is_refused(base, tmp_path):
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(ValueError, match="one folder"):
        check_output(tmp_path / "link", sources=[base], overwrite=True)


def broken_tensors():
    yield from list(TENSORS.items())[:4]
    raise RuntimeError("disk full")


@pytest.mark.parametrize("existing", [False, True])
def test_an_export_that_fails_leaves_what_was_there(base, tmp_path, existing):
    output = tmp_path / "out"
    if existing:
        write_hf_folder(output, base=base, tensors=TENSORS.items())
    with pytest.raises(RuntimeError, match="disk full"):
        write_hf_folder(output, base=base, tensors=broken_tensors(), overwrite=True, max_shard_bytes=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["base", "out"] if existing else ["base"])
    if existing:
        assert read(output).keys() == TENSORS.keys()


KILLED = """
import sys, time
from safetensors.torch import load_file
from megatron_r1v2.checkpoint.hf.folders import write_hf_folder
def slow():
    for number in range(4):
        yield f"layer.{number}.weight", __import__("torch").zeros(16, 16)
    print("half", flush=True)
    time.sleep(60)
write_hf_folder(sys.argv[2], base=sys.argv[1], tensors=slow(), overwrite=True, max_shard_bytes=1)
"""


def test_a_killed_export_does_not_look_finished_and_the_next_one_cleans_up(base, tmp_path):
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(base), str(output)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.kill()
    process.wait()
    assert not output.exists()
    left = tmp_path / ".out.partial"
    assert left.is_dir()
    assert not (left / "config.json").exists()
    with pytest.raises(ValueError, match="missing"):
        SafetensorsFolder(left)
    write_hf_folder(output, base=base, tensors=TENSORS.items())
    assert not left.exists()
    assert read(output).keys() == TENSORS.keys()


def test_a_kill_between_the_two_renames_loses_nothing(base, tmp_path):
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "old").write_text("old")
    with pytest.raises(RuntimeError, match="disk full"):
        write_hf_folder(tmp_path / "out", base=base, tensors=broken_tensors(), overwrite=True)
    assert (tmp_path / "out" / "old").read_text() == "old"


def test_reading_is_lazy(tmp_path):
    save_file({"large": torch.zeros(64, 1024, 1024, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    start = time.perf_counter()
    with SafetensorsFolder(tmp_path) as opened:
        assert opened.names() == ["large"]
    assert time.perf_counter() - start < 1.0


def test_json_errors_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        read_json(tmp_path / "config.json")
