"""Wider heads: the same logits, and refusals."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import InternVLForConditionalGeneration

from examples.wider_heads import widen_heads
from tests.tiny_hf import tiny_hf_model, tiny_text_config


def logits(folder):
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    config = model.config
    side = config.vision_config.image_size
    pixels = torch.randn(1, 3, *side)
    ids = torch.randint(0, 90, (1, 40))
    ids[0, 3 : 3 + config.image_seq_length] = config.image_token_id
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits


@pytest.mark.parametrize("tied", [False, True])
def test_wider_heads_give_the_same_logits(tmp_path, tied):
    tiny_hf_model(tmp_path / "hf", text=tiny_text_config(hidden=48, heads=2, kv_heads=1), tied=tied, seed=3)
    widen_heads(tmp_path / "hf", tmp_path / "out", 32)
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert (text["hidden_size"], text["num_attention_heads"]) == (64, 2)
    expected, found = logits(tmp_path / "hf"), logits(tmp_path / "out")
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_other_exports_are_refused(tmp_path):
    tiny_hf_model(tmp_path / "hf", text=tiny_text_config(hidden=128, heads=2, kv_heads=1), seed=3)
    with pytest.raises(ValueError, match="only a Qwen2 export of one file, with plain RoPE and heads up to 32"):
        widen_heads(tmp_path / "hf", tmp_path / "out", 32)
