"""verify, inspect and parts: what they say of checkpoints of every kind."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from checkpoint_tools import verify
from megatron_r1v2.checkpoint.hf.folders import read_json
from tests.checkpoint.damage import run


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


def test_sizes_that_are_none_are_refused(made, tmp_path, capsys):
    shutil.copytree(made / "chat", tmp_path / "chat")
    (tmp_path / "chat" / "checkpoint_manifest.json").unlink()
    config = read_json(tmp_path / "chat" / "config.json")
    config["vision_config"]["image_size"] = [1]
    (tmp_path / "chat" / "config.json").write_text(json.dumps(config))
    run(verify, tmp_path / "chat", code=1)
    assert "image_size=[1]" in capsys.readouterr().err
