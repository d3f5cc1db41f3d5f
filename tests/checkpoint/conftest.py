"""Small folders of every kind, made once; tests copy what they change. And one rank in the test process itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from checkpoint_tools import hf_to_hf, hf_to_megatron
from megatron_r1v2.checkpoint.megatron.run_folder import save_state
from tests.checkpoint.damage import convert
from tests.models.conftest import context
from tests.tiny_hf import tiny_hf_model, tiny_text_config, tiny_vision_config

__all__ = ["context", "folders", "made"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    """A foreign folder (no checksums), one of ours in several files, and a checkpoint of ours; all very small."""
    root = tmp_path_factory.mktemp("damage")
    vision = tiny_vision_config("6b", heads=2, head_size=4, layers=1, image_size=16, patch=4)
    text = tiny_text_config(hidden=16, heads=2, kv_heads=1, layers=1)
    tiny_hf_model(root / "foreign", "6b", vision=vision, text=text)
    for out in ("ours", "megatron"):
        tool, more = (hf_to_hf, ["--shard-size", "20KB"]) if out == "ours" else (hf_to_megatron, [])
        tool.main(["--hf", str(root / "foreign"), "--output", str(root / out), "--quiet", *more])
    for kind in ("foreign", "ours", "megatron"):
        assert convert(root / kind, root / f"of-{kind}")
    return root


@pytest.fixture(scope="session")
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
