"""The trained parts of a run: exported alone, put over their base and over no other."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools import inspect, parts, verify
from megatron_r1v2.checkpoint.hf.folders import read_json
from tests.checkpoint.damage import run


def test_trained_parts_travel_alone(made, tmp_path, capsys):
    run(parts, "export", "--checkpoint", made / "run", "--output", tmp_path / "adapter", "--quiet")
    exported = load_file(tmp_path / "adapter" / "model.safetensors")
    assert len(exported) == 6
    assert all(name.startswith("multi_modal_projector.") for name in exported)
    stated = read_json(tmp_path / "adapter" / "parts.json")
    assert (stated["parts"], stated["step"], stated["layout"]) == (["adapter"], 7, "transformers")
    assert not (tmp_path / "adapter" / "config.json").exists()
    # Over the same model in the other layout, whose own adapter is another.
    tensors = load_file(made / "chat" / "model.safetensors")
    changed = {name: value + 1 if name.startswith("mlp1.") else value for name, value in tensors.items()}
    shutil.copytree(made / "chat", tmp_path / "base")
    (tmp_path / "base" / "checkpoint_manifest.json").unlink()
    save_file(changed, tmp_path / "base" / "model.safetensors")
    run(
        parts,
        "apply",
        "--parts",
        tmp_path / "adapter",
        "--base",
        tmp_path / "base",
        "--output",
        tmp_path / "out",
        "--quiet",
    )
    whole = load_file(tmp_path / "out" / "model.safetensors")
    assert [name for name in tensors if not torch.equal(whole[name], tensors[name])] == []
    run(verify, tmp_path / "out", made / "hf")
    run(verify, tmp_path / "adapter", made / "hf", "--base", made / "hf", "--json", code=1)
    assert json.loads(capsys.readouterr().out.split("the same\n")[-1])["different"] == {}


def test_parts_refuse_a_model_they_were_not_trained_on(made, tmp_path, capsys):
    run(parts, "export", "--checkpoint", made / "run", "--output", tmp_path / "adapter", "--quiet")
    tensors = load_file(made / "hf" / "model.safetensors")
    tensors["vision_tower.embeddings.cls_token"].view(torch.int32)[0, 0, 0] ^= 1  # one bit
    shutil.copytree(made / "hf", tmp_path / "base")
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    for base in (tmp_path / "base", made / "other"):
        run(parts, "apply", "--parts", tmp_path / "adapter", "--base", base, "--output", tmp_path / "out", code=1)
        assert "is not the model that" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    run(parts, "apply", "--parts", made / "hf", "--base", made / "hf", "--output", tmp_path / "out", code=1)
    assert "parts.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [{"parts": 5}, {"parts": ["nonsense"]}, {"layout": [1]}, {"base_sha256": 1}, {"step": "x"}, {"version": 1}],
)
def test_a_description_of_parts_that_is_none_is_refused(made, tmp_path, capsys, change):
    run(parts, "export", "--checkpoint", made / "run", "--output", tmp_path / "adapter", "--quiet")
    (tmp_path / "adapter" / "checkpoint_manifest.json").unlink()
    path = tmp_path / "adapter" / "parts.json"
    path.write_text(json.dumps({**read_json(path), **change}))
    run(parts, "apply", "--parts", path.parent, "--base", made / "hf", "--output", tmp_path / "out", code=1)
    run(verify, path.parent, "--base", made / "hf", code=1)
    run(inspect, path.parent, code=1)
    told = capsys.readouterr().err.splitlines()[-3:]
    assert all("parts.json" in line and "export again" in line for line in told), told
