"""Folders as OpenGVLab and Skywork publish them: what comes in computes the same, what goes out has their keys."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from checkpoint_tools import hf_to_hf, reassemble
from megatron_r1v2.checkpoint.hf.config import (
    chat_config,
    image_token_id,
    layout_of,
    read_hf_config,
    transformers_config,
)
from megatron_r1v2.checkpoint.hf.folders import read_json
from megatron_r1v2.checkpoint.hf.refusals import Unsupported
from megatron_r1v2.checkpoint.hf.weights import fill_whole
from megatron_r1v2.checkpoint.sources import HfSpec
from megatron_r1v2.models.r1v2 import build_r1v2
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.resilience.files import write_json
from tests.checkpoint.chat_reference import SIDE, image_embeddings, write_chat_folder
from tests.tiny_hf import tiny_hf_language, tiny_hf_model


def convert(source: Path, output: Path, layout: str, *more: str) -> None:
    hf_to_hf.main(["--hf", str(source), "--output", str(output), "--layout", layout, "--quiet", *more])


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", ["6b", "300m"])
def test_transformers_computes_what_the_published_code_does(tmp_path, family):
    tensors = write_chat_folder(tmp_path / "chat", family=family, version="v2")
    convert(tmp_path / "chat", tmp_path / "out", "transformers")
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert model.config.vision_config.use_qk_norm == (family == "6b")
    with torch.no_grad():
        got = model.get_image_features(pixel_values=pixels(), return_dict=True).pooler_output
        expected = image_embeddings(tensors, pixels(), family=family, version="v2")
    assert torch.allclose(got.reshape(expected.shape), expected, atol=2e-5)
    # Back again: every tensor as it was.
    convert(tmp_path / "out", tmp_path / "again", "chat")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert [name for name in tensors if not torch.equal(again[name], tensors[name])] == []


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_our_model_computes_what_the_published_code_does_in_both_pixel_shuffles(context, tmp_path, version):
    tensors = write_chat_folder(tmp_path / "chat", family="6b", version=version)
    with HfSpec(tmp_path / "chat").open() as source:
        assert source.architecture.pixel_shuffle == version
        settings = ComputeSettings(dtype=torch.float32)
        model = build_r1v2(source.architecture, settings, groups=context.groups, device=context.device)
        fill_whole(model, source.parameter)
    tiles_TCHW = torch.randint(
        0, 256, (2, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        got = model.adapt(model.encode_tiles(tiles_TCHW))
        expected = image_embeddings(tensors, (tiles_TCHW / 255 - mean) / std, family="6b", version=version)
    assert torch.allclose(got, expected.flatten(0, 1), atol=2e-5)


def test_the_first_pixel_shuffle_stays_in_the_chat_layout(tmp_path, capsys):
    tensors = write_chat_folder(tmp_path / "chat", family="6b", version="v1")
    convert(tmp_path / "chat", tmp_path / "same", "chat")
    assert load_file(tmp_path / "same" / "model.safetensors").keys() == tensors.keys()
    assert read_json(tmp_path / "same" / "config.json")["ps_version"] == "v1"
    with pytest.raises(SystemExit):
        convert(tmp_path / "chat", tmp_path / "out", "transformers")
    assert "pixel_shuffle='v1'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_chat_config_is_what_vllm_reads(tmp_path):
    """The attributes that vLLM's SkyworkR1VChatModel and its config class take, spelled out by hand."""
    write_chat_folder(tmp_path / "chat", family="6b", version="v2")
    original = read_json(tmp_path / "chat" / "config.json")
    made = chat_config(transformers_config(original, image_token_id=5), max_tiles=6)
    assert made["model_type"] == "internvl_chat"
    for key in ("select_layer", "force_image_size", "downsample_ratio", "ps_version", "dynamic_image_size"):
        assert made[key] == original[key], key
    for key in ("use_thumbnail", "min_dynamic_patch", "max_dynamic_patch"):
        assert made[key] == original[key], key
    assert made["llm_config"]["architectures"] == ["Qwen2ForCausalLM"]
    kept = {key: original["vision_config"][key] for key in original["vision_config"]}
    assert {key: made["vision_config"].get(key) for key in kept} == kept
    for key in (
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "vocab_size",
        "rope_theta",
    ):
        assert made["llm_config"][key] == original["llm_config"][key], key


def test_published_towers_and_adapters_are_components(tmp_path):
    tensors = write_chat_folder(tmp_path / "chat", family="6b", version="v2")
    tower = {n.removeprefix("vision_model."): v for n, v in tensors.items() if n.startswith("vision_model.")}
    (tmp_path / "vit").mkdir()
    save_file(tower, tmp_path / "vit" / "model.safetensors")
    write_json(tmp_path / "vit" / "config.json", read_json(tmp_path / "chat" / "config.json")["vision_config"])
    tiny_hf_language(tmp_path / "language")
    parts = ["--language", str(tmp_path / "language"), "--adapter", str(tmp_path / "chat"), "--quiet"]
    for number, (vision, layout) in enumerate([("vit", "chat"), ("chat", "chat"), ("vit", "transformers")]):
        out = tmp_path / str(number)
        reassemble.main([*parts, "--vision", str(tmp_path / vision), "--output", str(out), "--layout", layout])
        if layout == "transformers":
            convert(out, tmp_path / "back", "chat")
            out = tmp_path / "back"
        got = load_file(out / "model.safetensors")
        same = {n: v for n, v in tensors.items() if n.startswith(("vision_model.", "mlp1."))}
        assert [name for name in same if not torch.equal(got[name], same[name])] == []


def test_image_token_is_found_wherever_a_tokenizer_keeps_it(tmp_path):
    write_chat_folder(tmp_path / "chat", family="6b", version="v2")
    expected = AutoTokenizer.from_pretrained(tmp_path / "chat").convert_tokens_to_ids("<IMG_CONTEXT>")
    assert image_token_id(tmp_path / "chat") == expected
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name.split(".")[0]).mkdir()
        shutil.copy(tmp_path / "chat" / name, tmp_path / name.split(".")[0])
    assert image_token_id(tmp_path / "tokenizer") == expected
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": 151667}))
    assert image_token_id(tmp_path / "slow") == 151667
    with pytest.raises(ValueError, match="no tokenizer file"):
        image_token_id(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"force_image_size": 64}, "force_image_size=64"),
        ({"select_layer": -4}, "select_layer=-4"),
        ({"llm_config": None}, "no llm_config"),
        ({"ps_version": "v3"}, "ps_version='v3'"),
        ({"model_type": "internvl_x"}, "model_type='internvl_x'"),
    ],
)
def test_what_the_model_does_not_compute_is_refused(tmp_path, capsys, change, told):
    write_chat_folder(tmp_path / "chat", family="6b", version="v2")
    config = read_json(tmp_path / "chat" / "config.json")
    write_json(tmp_path / "chat" / "config.json", {**config, **change})
    with pytest.raises(SystemExit):
        convert(tmp_path / "chat", tmp_path / "out", "chat")
    assert told in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat"]


def test_layouts_are_told_apart():
    assert layout_of({"model_type": "internvl"}) == "transformers"
    assert layout_of({"model_type": "internvl_chat"}) == "chat"
    with pytest.raises(ValueError, match="reassemble"):
        layout_of({"model_type": "qwen2"})


@pytest.mark.parametrize("said", [None, "true", 1])
def test_a_tie_that_is_no_truth_value_is_refused(tmp_path, said):
    tiny_hf_model(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    write_json(path, read_json(path) | {"tie_word_embeddings": said})
    with pytest.raises(ValueError, match="tie_word_embeddings=.*accepted: true or false"):
        read_hf_config(tmp_path / "model")


def test_matrices_that_are_equal_only_when_they_are_rounded_are_two(tmp_path):
    """As transformers has it, which compares them in the dtype of the model."""
    tiny_hf_model(tmp_path / "model", tied=True)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    head, embedding = "language_model.lm_head.weight", tensors["language_model.model.embed_tokens.weight"]
    for stored, tied in ((embedding.half(), False), (embedding.clone(), True), (embedding.double(), True)):
        save_file({**tensors, head: stored}, path, {"format": "pt"})
        assert read_hf_config(tmp_path / "model")[0]["tie_word_embeddings"] is tied


@pytest.mark.parametrize("named", ["LlamaForCausalLM", "OtherForCausalLM"])
def test_a_language_model_of_two_names_is_refused(tmp_path, named):
    """The publishers' code goes by the class, other programs by model_type."""
    write_chat_folder(tmp_path / "chat", family="6b", version="v2")
    config = read_json(tmp_path / "chat" / "config.json")
    config["llm_config"]["architectures"] = [named]
    with pytest.raises(Unsupported, match="model_type='qwen2' and architectures of"):
        transformers_config(config, image_token_id=0)
    del config["llm_config"]["architectures"]
    assert transformers_config(config, image_token_id=0)["text_config"]["model_type"] == "qwen2"
