"""verify, inspect and parts: what they say of checkpoints of every kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools import hf_to_hf, hf_to_megatron, inspect, parts, verify
from megatron_r1v2.checkpoint.hf.folders import read_json
from megatron_r1v2.checkpoint.megatron.run_folder import save_state
from tests.tiny_hf import tiny_hf_model, tiny_hf_vision


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """One model in three shapes, each written by our tools, and another model."""
    root = tmp_path_factory.mktemp("tools")
    tiny_hf_model(root / "hf", "6b")
    tiny_hf_model(root / "other", "6b", seed=9)
    hf_to_hf.main(["--hf", str(root / "hf"), "--output", str(root / "chat"), "--layout", "chat", "--quiet"])
    hf_to_megatron.main(["--hf", str(root / "hf"), "--output", str(root / "megatron"), "--quiet"])
    checkpoint = root / "run" / "checkpoints" / "step-00000007"
    shutil.copytree(root / "megatron", checkpoint)
    shutil.rmtree(checkpoint / "hf")  # as a run saves it: the base is named in the recipe
    (checkpoint / "checkpoint_manifest.json").unlink()
    (checkpoint / "recipe.yaml").write_text(f"model:\n  hf_path: {root / 'hf'}\n")
    state = {"step": 7, "version": 3, "parts": ["adapter"], "trained": ["adapter"]}
    save_state(checkpoint, state)
    return root


def run(tool, *arguments: str, code: int = 0) -> None:
    if code == 0:
        tool.main([str(argument) for argument in arguments])
        return
    with pytest.raises(SystemExit) as stopped:
        tool.main([str(argument) for argument in arguments])
    assert stopped.value.code == code


def test_one_model_in_three_shapes_is_the_same(made, capsys):
    digests = set()
    for pair in (("hf", "chat"), ("chat", "megatron")):
        run(verify, made / pair[0], made / pair[1], "--json")
        found = json.loads(capsys.readouterr().out)
        assert found["ok"]
        digests |= set(found["sha256"])
    assert len(digests) == 1
    for name, checksums in (("hf", "none"), ("chat", "manifest"), ("megatron", "manifest")):
        run(verify, made / name, "--json")
        found = json.loads(capsys.readouterr().out)
        assert found["checksums"] == checksums
        assert {found["sha256"]} == digests


def test_what_differs_is_named(made, tmp_path, capsys):
    tensors = load_file(made / "hf" / "model.safetensors")
    tensors["language_model.model.norm.weight"][3] += 0.5
    shutil.copytree(made / "hf", tmp_path / "changed")
    save_file(tensors, tmp_path / "changed" / "model.safetensors")
    run(verify, made / "hf", tmp_path / "changed", code=1)
    told = capsys.readouterr().out
    assert "language.decoder.final_layernorm.weight" in told
    assert "largest difference 0.5" in told
    assert told.endswith("NOT the same\n")
    run(verify, made / "hf", made / "run", "--json", code=1)
    found = json.loads(capsys.readouterr().out)
    assert found["different"] == {}
    assert {name.split(".")[0] for name in found["only_first"]} == {"vision", "language"}


@pytest.mark.slow
def test_logits_are_compared_on_the_same_input(made, capsys):
    run(verify, made / "hf", made / "megatron", "--logits", "--json")
    assert json.loads(capsys.readouterr().out)["logits"]["largest_difference"] == 0
    run(verify, made / "chat", made / "other", "--logits", "--json", code=1)
    assert json.loads(capsys.readouterr().out)["logits"]["largest_difference"] > 1e-3


def test_changed_files_are_found(made, tmp_path, capsys):
    shutil.copytree(made / "chat", tmp_path / "chat")
    (tmp_path / "chat" / "tokenizer.json").write_text("{}")
    run(verify, tmp_path / "chat", code=1)
    assert "tokenizer.json is not what it was" in capsys.readouterr().err


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


@pytest.mark.parametrize("change", [{"tensors": [1]}, {"tensors": {"a": 1}}, {"files": 5}, {"files": {}}])
def test_a_manifest_that_is_none_is_refused(made, tmp_path, capsys, change):
    shutil.copytree(made / "chat", tmp_path / "chat")
    path = tmp_path / "chat" / "checkpoint_manifest.json"
    path.write_text(json.dumps({**read_json(path), **change}))
    run(verify, tmp_path / "chat", code=1)
    assert "checkpoint_manifest.json is damaged" in capsys.readouterr().err


def test_sizes_that_are_none_are_refused(made, tmp_path, capsys):
    shutil.copytree(made / "chat", tmp_path / "chat")
    (tmp_path / "chat" / "checkpoint_manifest.json").unlink()
    config = read_json(tmp_path / "chat" / "config.json")
    config["vision_config"]["image_size"] = [1]
    (tmp_path / "chat" / "config.json").write_text(json.dumps(config))
    run(verify, tmp_path / "chat", code=1)
    assert "image_size=[1]" in capsys.readouterr().err


def test_names_with_brackets_are_shown_as_they_are(tmp_path, capsys):
    folder = tmp_path / "of[b]"
    folder.mkdir()
    save_file({"a[/b]": torch.zeros(1), "[/c].x": torch.zeros(1)}, folder / "model.safetensors")
    run(inspect, folder, "--tensors")
    told = capsys.readouterr().out
    assert all(name in told for name in ("of[b]", "a[/b]", "[/c].x"))


@pytest.mark.parametrize("tool", [verify, inspect, parts])
def test_help_has_an_example(tool, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert f"python -m checkpoint_tools.{tool.__name__.split('.')[-1]}" in told
    assert "Bus error" in told
