"""The tools on folders as their publishers write them: each case stopped somebody once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import InternVLForConditionalGeneration

from checkpoint_tools import hf_to_hf, hf_to_megatron, inspect, verify
from megatron_r1v2.checkpoint.hf.config import read_hf_architecture
from megatron_r1v2.checkpoint.hf.folders import read_json
from tests.checkpoint.damage import run
from tests.checkpoint.published_folders import write_tiny_published
from tests.tiny_hf import tiny_hf_model, tiny_text_config

DYNAMIC = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}


@pytest.mark.parametrize("publisher", ["skywork", "internvl"])
def test_every_tool_takes_a_published_folder(tmp_path: Path, capsys, publisher) -> None:
    """Skywork's model_type is its own; TensorRT-LLM asserts it."""
    write_tiny_published(tmp_path / "model", publisher)
    for layout in ("transformers", "chat"):
        run(hf_to_hf, "--hf", tmp_path / "model", "--output", tmp_path / layout, "--layout", layout, "--quiet")
    run(hf_to_megatron, "--hf", tmp_path / "model", "--output", tmp_path / "megatron", "--quiet")
    run(inspect, tmp_path / "model")
    assert "whole model" in capsys.readouterr().out
    for other in ("transformers", "chat", "megatron"):
        run(verify, tmp_path / "model", tmp_path / other)


@pytest.mark.parametrize("rope", [DYNAMIC, {"factor": 2.0, "type": "dynamic"}, {"type": "linear", "factor": 1.0}, None])
def test_rotations_that_change_nothing_are_taken_and_kept(tmp_path: Path, rope) -> None:
    """InternVL3-1B's own, InternVL2.5's older form, and others that equal no scaling up to max_position_embeddings."""
    write_tiny_published(tmp_path / "model", "internvl", rope_scaling=rope)
    for layout, part in (("transformers", "text_config"), ("chat", "llm_config")):
        run(hf_to_hf, "--hf", tmp_path / "model", "--output", tmp_path / layout, "--layout", layout, "--quiet")
        assert read_json(tmp_path / layout / "config.json")[part]["rope_scaling"] == rope
        assert (
            read_hf_architecture(tmp_path / layout)[0].language == read_hf_architecture(tmp_path / "model")[0].language
        )


def test_an_untied_model_that_transformers_5_saved_stays_untied(tmp_path: Path) -> None:
    """Its top level says that embeddings are tied, the class's default, and both tensors are there and differ."""
    tiny_hf_model(tmp_path / "model", text=tiny_text_config())
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config |= {"tie_word_embeddings": True, "text_config": {**config["text_config"], "tie_word_embeddings": False}}
    path.write_text(json.dumps(config))
    theirs = InternVLForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert theirs.lm_head.weight.data_ptr() != theirs.get_input_embeddings().weight.data_ptr()
    run(hf_to_megatron, "--hf", tmp_path / "model", "--output", tmp_path / "megatron", "--quiet")
    assert not read_hf_architecture(tmp_path / "model")[0].language.tied_embeddings


def test_shards_beside_another_single_file_are_refused_and_both_are_named(tmp_path: Path, capsys) -> None:
    """transformers reads the single file alone, others the shards, and neither says so."""
    tiny_hf_model(tmp_path / "both", seed=0, max_shard_size="400KB")
    tiny_hf_model(tmp_path / "new", seed=9)
    shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path / "both")
    key = "model.language_model.norm.weight"
    read, new = (
        InternVLForConditionalGeneration.from_pretrained(tmp_path / name).state_dict() for name in ("both", "new")
    )
    assert torch.equal(read[key], new[key])
    run(verify, tmp_path / "both", code=1)
    told = capsys.readouterr().err
    assert "model.safetensors.index.json" in told
    assert "model.safetensors;" in told


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("llm_config", "rms_norm_eps"),
        ("llm_config", "max_position_embeddings"),
        ("llm_config", "vocab_size"),
        ("vision_config", "num_attention_heads"),
        ("vision_config", "intermediate_size"),
    ],
)
def test_a_key_that_is_left_out_has_its_default_or_is_refused_in_words(tmp_path: Path, capsys, part, key) -> None:
    config = write_tiny_published(tmp_path / "model", "internvl", rope_scaling=None)
    del config[part][key]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    # Sizes by default are not those of the tensors, but for the two that are no size of a tensor.
    run(verify, tmp_path / "model", code=0 if key in ("rms_norm_eps", "max_position_embeddings") else 1)
    told = capsys.readouterr().err
    assert told.startswith("error: ") or not told
