"""Folders that are no model that can be read: refused by what they are, by every tool."""

from __future__ import annotations

import pickle
import re
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools import hf_to_hf, hf_to_megatron, inspect, megatron_to_hf, parts, reassemble, verify
from megatron_r1v2.checkpoint.hf.config import read_hf_architecture, transformers_config
from megatron_r1v2.checkpoint.hf.folders import read_json
from megatron_r1v2.checkpoint.hf.refusals import Kind, Unsupported, check_config, check_folder, check_tensors
from megatron_r1v2.checkpoint.hf.weights import check_hf_tensors
from megatron_r1v2.checkpoint.sources import HfSpec
from megatron_r1v2.resilience.files import write_json
from tests.checkpoint.damage import run


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ"),
        ({"llm_config": {"quantization_config": {"quant_method": "gptq"}}}, "GPTQ"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}}, "FP8"),
        ({"quantization_config": {"quant_method": "new"}}, "new"),
        ({"quantization_config": "odd"}, "odd"),
    ],
)
def test_quantized_weights_are_named_by_their_kind(config, kind):
    with pytest.raises(ValueError, match=rf"^here holds weights quantized by {kind} \(quantization_config\)"):
        check_config(config, "here")


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"llm_config": 5, "text_config": []}])
def test_other_configurations_pass(config):
    check_config(config, "here")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("language_model.model.layers.0.mlp.up_proj.qweight", "quantized by AWQ or GPTQ"),
        ("language_model.model.layers.0.mlp.up_proj.weight_scale_inv", "quantized by FP8"),
        ("base_model.model.layers.0.mlp.up_proj.lora_A.weight", "LoRA adapters .*merge_and_unload"),
        ("language_model.layers.0.q_proj.lora_B.default.weight", "LoRA adapters"),
    ],
)
def test_tensors_tell_what_a_configuration_hides(name, told):
    check_tensors(dict.fromkeys(("a.weight", "lora.weight", "qweight"), torch.bfloat16), "here")
    with pytest.raises(ValueError, match=told):
        check_tensors(dict.fromkeys(("a.weight", name), torch.bfloat16), "here")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_eight_bits_are_fp8_whatever_a_configuration_says(made, tmp_path, capsys, dtype):
    shutil.copytree(made / "hf", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name].to(dtype)}, path, {"format": "pt"})
    architecture, layout = read_hf_architecture(tmp_path / "model")
    told = f"quantized by FP8 \\({re.escape(name)} is torch.float8"
    with pytest.raises(Unsupported, match=told):
        check_hf_tensors(tmp_path / "model", architecture, layout)
    run(verify, tmp_path / "model", code=1)
    assert re.search(told, capsys.readouterr().err)


def test_a_name_on_the_hub_gets_the_command_that_downloads_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = "hf download OpenGVLab/InternVL3-1B --local-dir InternVL3-1B"
    with pytest.raises(ValueError, match=told):
        check_folder("OpenGVLab/InternVL3-1B")
    with pytest.raises(ValueError, match=r"is missing; give the folder"):
        check_folder(tmp_path / "nowhere")
    check_folder(tmp_path)


@pytest.mark.parametrize("missing", ["Skywork/Skywork-R1V2-38B", "https://huggingface.co/Skywork/Skywork-R1V2-38B"])
@pytest.mark.parametrize(
    "command",
    [
        (megatron_to_hf, "--checkpoint", "X", "--output", "out"),
        (parts, "export", "--checkpoint", "X", "--output", "out"),
        (parts, "apply", "--parts", "X", "--base", ".", "--output", "out"),
        (verify, "X"),
        (hf_to_hf, "--hf", "X", "--output", "out"),
    ],
)
def test_every_place_of_a_folder_tells_how_to_download_it(tmp_path, monkeypatch, capsys, command, missing):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "config.json", {"model_type": "internvl"})  # all of a base that is read before
    tool, *arguments = command
    run(tool, *(missing if argument == "X" else argument for argument in arguments), code=1)
    assert "`hf download Skywork/Skywork-R1V2-38B --local-dir Skywork-R1V2-38B`" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["awq", "lora", "hub", "shards", "scale"])
def test_every_tool_refuses_them(made, tmp_path, monkeypatch, capsys, change):
    monkeypatch.chdir(tmp_path)
    folder = Path("Org/Model") if change == "hub" else tmp_path / "model"
    if change != "hub":
        shutil.copytree(made / "hf", folder)
    if change == "awq":
        config = read_json(folder / "config.json")
        write_json(folder / "config.json", {**config, "quantization_config": {"quant_method": "awq"}})
    if change == "lora":
        write_json(folder / "adapter_config.json", {"peft_type": "LORA"})
    if change == "shards":
        write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    if change == "scale":
        tensors = load_file(folder / "model.safetensors")
        tensors["language_model.model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(1)
        save_file(tensors, folder / "model.safetensors")
    told = {
        "awq": "quantized by AWQ",
        "lora": "LoRA adapters",
        "hub": "hf download Org/Model",
        "shards": "model.safetensors.index.json with its shards and model.safetensors",
        "scale": "quantized by FP8",
    }[change]
    calls = [
        (hf_to_hf, ["--hf", folder, "--output", tmp_path / "out", "--quiet"]),
        (verify, [folder]),
        (inspect, [folder]),
        (reassemble, ["--vision", folder, "--language", made / "hf", "--output", tmp_path / "out", "--quiet"]),
    ]
    for tool, arguments in calls[: {"scale": 2, "shards": 3}.get(change, 4)]:
        run(tool, *arguments, code=1)
        assert told in capsys.readouterr().err, tool.__name__
    assert not (tmp_path / "out").exists()


def with_keys(config, part="", **keys):
    """Return a configuration with other keys, in one of its parts or at its top."""
    return {**config, part: {**config[part], **keys}} if part else {**config, **keys}


@pytest.mark.parametrize(
    ("kind", "part", "keys"),
    [
        ("quantized weights", "", {"quantization_config": {"quant_method": "awq"}}),
        ("model family", "", {"model_type": "llava"}),
        ("model family", "text_config", {"model_type": "internlm2"}),
        ("model family", "vision_config", {"model_type": "siglip"}),
        ("rotations", "text_config", {"rope_parameters": {"rope_type": "proportional"}}),
        ("sliding window", "text_config", {"use_sliding_window": True}),
        ("biases", "text_config", {"model_type": "llama", "attention_bias": True}),
        ("activation", "text_config", {"hidden_act": "gelu"}),
        ("activation", "", {"projector_hidden_act": "relu"}),
        ("vision settings", "", {"vision_feature_layer": -2}),
        ("vision settings", "vision_config", {"use_mean_pooling": False}),
        ("vision settings", "vision_config", {"use_mask_token": True}),
        ("vision settings", "vision_config", {"image_size": [32, 64]}),
        ("uneven sizes", "", {"downsample_ratio": 0.3}),
        ("image token", "", {"image_token_id": 10**6}),
    ],
)
def test_a_refused_setting_is_of_a_kind(made, tmp_path, kind, part, keys):
    config = with_keys(read_json(made / "hf" / "config.json"), part, **keys)
    write_json(tmp_path / "config.json", config)
    with pytest.raises(Unsupported) as refused:
        read_hf_architecture(tmp_path)
    assert refused.value.kind == kind
    again = pickle.loads(pickle.dumps(refused.value))
    assert (str(again), again.kind) == (str(refused.value), kind)


@pytest.mark.parametrize(
    ("kind", "part", "keys"),
    [
        ("LoRA adapters", "", {"use_llm_lora": 8}),
        ("mixture of experts", "vision_config", {"use_moe": True}),
        ("activation", "vision_config", {"hidden_act": "relu"}),
        ("vision settings", "", {"select_layer": -4}),
        ("resized positions", "", {"force_image_size": 64}),
    ],
)
def test_a_refused_setting_of_the_chat_layout_is_of_a_kind(made, kind, part, keys):
    config = with_keys(read_json(made / "chat" / "config.json"), part, **keys)
    with pytest.raises(Unsupported) as refused:
        transformers_config(config, image_token_id=0)
    assert refused.value.kind == kind


@pytest.mark.parametrize("kind", ["pickled weights", "two sets of weights", "mixed dtypes", "superfluous tensors"])
def test_refused_weights_are_of_a_kind(made, tmp_path, kind):
    folder = tmp_path / "model"
    shutil.copytree(made / "hf", folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    if kind == "pickled weights":
        weights.rename(folder / "pytorch_model.bin")
    if kind == "two sets of weights":
        write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    if kind == "mixed dtypes":
        name = "language_model.model.layers.0.self_attn.q_proj.weight"
        save_file({**tensors, name: tensors[name].bfloat16()}, weights)
    if kind == "superfluous tensors":
        save_file({**tensors, "more.weight": torch.ones(1)}, weights)
    with pytest.raises(Unsupported) as refused:
        HfSpec(folder).open()
    assert refused.value.kind == kind


def test_the_documentation_lists_every_kind_and_the_code_raises_each():
    text = Path("docs/checkpoints.md").read_text(encoding="utf-8").partition("## What is refused")[2]
    rows = re.findall(r"^\| ([^|]+?) \|", text.partition("\n## ")[0], re.MULTILINE)
    assert rows[2:] == list(get_args(Kind)), "in this order, behind the head of the table"
    source = "".join(path.read_text(encoding="utf-8") for path in Path("megatron_r1v2/checkpoint").rglob("*.py"))
    raised = re.findall(r"Unsupported\(\s*[^,]+,|kind: Kind = [^\n]+", source)
    assert set(re.findall(r'"(\w[\w ]+)"', "".join(raised))) - {"model_type", "_act"} == set(get_args(Kind))


def test_every_argument_that_is_a_model_gets_the_command_that_downloads_it(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out, hub, here = ["--output", tmp_path / "out", "--quiet"], "Org/Model", made / "hf"
    calls = [
        (hf_to_megatron, ["--hf", hub, *out]),
        (megatron_to_hf, ["--checkpoint", made / "run", "--base", hub, *out]),
        (reassemble, ["--vision", here, "--language", hub, *out]),
        (reassemble, ["--vision", here, "--language", here, "--adapter", hub, *out]),
        (verify, [here, hub]),
    ]
    for tool, arguments in calls:
        run(tool, *arguments, code=1)
        assert "`hf download Org/Model --local-dir Model`" in capsys.readouterr().err, (tool.__name__, arguments)
    assert not (tmp_path / "out").exists()
