"""The content of checkpoints of every kind, by headers alone."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools import inspect
from tests.checkpoint.damage import run
from tests.tiny_hf import tiny_hf_vision


def test_inspect_counts_what_is_there(made, tmp_path, capsys):
    wanted = sum(tensor.numel() for tensor in load_file(made / "hf" / "model.safetensors").values())
    for name, layout in (("hf", "transformers"), ("chat", "chat"), ("megatron", "torch_dist")):
        run(inspect, made / name, "--json", "--tensors")
        found = json.loads(capsys.readouterr().out)
        assert found["layout"] == layout
        assert sum(part["numbers"] for part in found["parts"].values()) == wanted
        assert found["bytes"] == 4 * wanted
        assert set(found["parts"]) == {"vision", "adapter", "language"}
        assert found["checksums"] == (name != "hf")
    run(inspect, made / "run", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["stored"], found["trained"]) == (7, ["adapter"], ["adapter"])
    tiny_hf_vision(tmp_path / "vision")
    run(inspect, tmp_path / "vision", "--tensors")
    told = capsys.readouterr().out
    assert "component (internvl_vision)" in told
    assert "encoder.layer.1.lambda_1" in told
    run(inspect, tmp_path, code=1)


def test_names_with_brackets_are_shown_as_they_are(tmp_path, capsys):
    folder = tmp_path / "of[b]"
    folder.mkdir()
    save_file({"a[/b]": torch.zeros(1), "[/c].x": torch.zeros(1)}, folder / "model.safetensors")
    run(inspect, folder, "--tensors")
    told = capsys.readouterr().out
    assert all(name in told for name in ("of[b]", "a[/b]", "[/c].x"))
