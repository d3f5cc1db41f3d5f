"""hf_to_hf: the options of the command line reach the folder that it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_tools import hf_to_hf, hf_to_megatron, megatron_to_hf
from megatron_r1v2.checkpoint.hf.folders import read_json
from tests.checkpoint.published_folders import Publisher, chat_tensors, published_config, write_published_folder
from tests.tiny_hf import tiny_hf_model, tiny_text_config, tiny_vision_config


def test_layout_dtype_and_size_of_files_are_those_asked_for(made, tmp_path, capsys):
    arguments = ["--hf", str(made / "hf"), "--output", str(tmp_path / "out"), "--quiet"]
    hf_to_hf.main([*arguments, "--layout", "chat", "--dtype", "bf16", "--shard-size", "200KB"])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'} in the layout chat\n"
    assert read_json(tmp_path / "out" / "config.json")["model_type"] == "internvl_chat"
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "mlp1.1.weight" in tensors


def published(root: Path, publisher: Publisher, *, version: str = "v2") -> tuple[Path, Path]:
    """Write a model as transformers saves it, and as a publisher has it, with all keys of the published config.json."""
    vision, text = tiny_vision_config("6b" if publisher == "skywork" else "300m"), tiny_text_config()
    tiny_hf_model(root / "transformers", vision=vision, text=text)
    config = {**published_config(publisher, vision, text), "ps_version": version}
    write_published_folder(root / "published", config, root / "transformers")
    return root / "published", root / "transformers"


def convert(source: Path, output: Path, layout: str) -> dict[str, torch.Tensor]:
    hf_to_hf.main(["--hf", str(source), "--output", str(output), "--layout", layout, "--quiet"])
    return load_file(output / "model.safetensors")


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors that are not the same, bit for bit."""
    same = {name for name in one.keys() & other.keys() if torch.equal(one[name], other[name])}
    return sorted((one.keys() | other.keys()) - same)


@pytest.mark.parametrize("publisher", ["internvl", "skywork"])
def test_a_published_folder_goes_there_and_back_bit_for_bit(tmp_path, publisher):
    folder, transformers = published(tmp_path, publisher)
    there = convert(folder, tmp_path / "there", "transformers")
    assert differing(there, load_file(transformers / "model.safetensors")) == []
    back = convert(tmp_path / "there", tmp_path / "back", "chat")
    assert differing(back, load_file(folder / "model.safetensors")) == []
    # What decides the model is in config.json again, the scaling of the rotations included.
    before, after = (read_json(path / "config.json") for path in (folder, tmp_path / "back"))
    for key in ("downsample_ratio", "force_image_size", "ps_version", "select_layer"):
        assert after[key] == before[key]
    vision = ("hidden_size", "image_size", "norm_type", "num_attention_heads", "qk_normalization", "qkv_bias")
    assert {key: after["vision_config"][key] for key in vision} == {key: before["vision_config"][key] for key in vision}
    text = ("model_type", "num_key_value_heads", "rms_norm_eps", "rope_scaling", "rope_theta", "vocab_size")
    assert {key: after["llm_config"].get(key) for key in text} == {key: before["llm_config"][key] for key in text}


def test_a_folder_of_the_first_pixel_shuffle_keeps_its_layout(tmp_path):
    folder, _ = published(tmp_path, "skywork", version="v1")
    again = convert(folder, tmp_path / "again", "chat")
    assert differing(again, load_file(folder / "model.safetensors")) == []
    config = read_json(tmp_path / "again" / "config.json")
    assert (config["ps_version"], config["model_type"]) == ("v1", "skywork_chat")
    # The name that the publishers' code reads.
    assert "torch_dtype" in config
    assert "dtype" not in config


@pytest.mark.parametrize("publisher", ["internvl", "skywork"])
@pytest.mark.parametrize("layout", ["transformers", "chat"])
def test_a_published_folder_goes_through_a_checkpoint_bit_for_bit(tmp_path, publisher, layout):
    folder, transformers = published(tmp_path, publisher)
    hf_to_megatron.main(["--hf", str(folder), "--output", str(tmp_path / "megatron"), "--quiet"])
    arguments = ["--checkpoint", str(tmp_path / "megatron"), "--output", str(tmp_path / "out")]
    megatron_to_hf.main([*arguments, "--layout", layout, "--quiet"])
    expected = load_file(transformers / "model.safetensors")
    expected = expected if layout == "transformers" else chat_tensors(expected)
    assert differing(load_file(tmp_path / "out" / "model.safetensors"), expected) == []
