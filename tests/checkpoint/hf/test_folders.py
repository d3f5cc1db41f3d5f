"""Folders on disk: what is broken is named."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file

from megatron_r1v2.checkpoint.hf.folders import (
    SafetensorsFolder,
    check_output,
    copy_companions,
    read_json,
    with_dtype,
)
from megatron_r1v2.resilience.files import write_json

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
    save_torch_state_dict(TENSORS, folder, max_shard_size=3000)
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    with SafetensorsFolder(folder) as opened:
        return {name: opened.tensor(name) for name in opened.names()}


@pytest.mark.parametrize(("max_shard_bytes", "num_files"), [(10**9, 1), (3000, 3), (2048, 3), (2047, 6), (1, 6)])
def test_tensors_in_one_file_or_several_are_read(tmp_path, max_shard_bytes, num_files):
    save_torch_state_dict(TENSORS, tmp_path, max_shard_size=max_shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == num_files
    again = read(tmp_path)
    assert again.keys() == TENSORS.keys()
    assert all(torch.equal(again[name], TENSORS[name]) for name in TENSORS)


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


def test_companions_are_copied_but_no_code_weights_or_configuration(base, tmp_path):
    copy_companions(base, tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        "tokenizer.json",
        "generation_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
    }


def test_the_configuration_names_the_widest_dtype_and_no_code(base):
    config = read_json(base / "config.json")
    assert with_dtype(config, {torch.float32}) == {"model_type": "internvl", "dtype": "float32"}
    nested = {"model_type": "internvl_chat", "llm_config": {"torch_dtype": "float16", "vocab_size": 3}}
    assert with_dtype(nested, {torch.bfloat16, torch.float32}) == {
        "model_type": "internvl_chat",
        "torch_dtype": "float32",
        "llm_config": {"vocab_size": 3},
    }


@pytest.mark.parametrize("output", ["base", "base/.", "base/inside", "."])
def test_source_as_destination_is_refused_even_with_overwrite(base, tmp_path, output):
    with pytest.raises(ValueError, match="one folder or one inside the other"):
        check_output(tmp_path / output, sources=[base], overwrite=True)


def test_source_through_a_link_is_refused(base, tmp_path):
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(ValueError, match="one folder"):
        check_output(tmp_path / "link", sources=[base], overwrite=True)


def test_reading_is_lazy(tmp_path):
    save_file({"large": torch.zeros(64, 1024, 1024, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    start = time.process_time()
    with SafetensorsFolder(tmp_path) as opened:
        assert opened.names() == ["large"]
    assert time.process_time() - start < 1.0


def test_json_errors_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        read_json(tmp_path / "config.json")


def test_json_that_is_nested_without_an_end_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for depth in (100, 900, 100_000):
        path.write_text('{"a":' * depth + "1" + "}" * depth)
        with pytest.raises(ValueError, match=r"nested more than 64 levels deep|is not valid JSON: maximum recursion"):
            read_json(path)
    path.write_text('{"a": [' * 10 + "1" + "]}" * 10)
    assert read_json(path)["a"]
