"""Folders that are no model that can be read: refused by what they are, by every tool."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools import hf_to_hf, inspect, reassemble, verify
from megatron_r1v2.checkpoint.hf.folders import read_json
from megatron_r1v2.checkpoint.hf.refusals import check_config, check_folder, check_tensor_names
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
    check_tensor_names(["a.weight", "lora.weight", "qweight"], "here")
    with pytest.raises(ValueError, match=told):
        check_tensor_names(["a.weight", name], "here")


def test_a_name_on_the_hub_gets_the_command_that_downloads_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = "hf download OpenGVLab/InternVL3-1B --local-dir InternVL3-1B"
    with pytest.raises(ValueError, match=told):
        check_folder("OpenGVLab/InternVL3-1B")
    with pytest.raises(ValueError, match=r"is missing; give the folder"):
        check_folder(tmp_path / "nowhere")
    check_folder(tmp_path)


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
