"""A tiny checkpoint in the layout of Skywork-VL-Reward, and its score computed by transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from tests.tiny_hf import randomise

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
VIDEO = "<|video_pad|>"
# Qwen2.5-VL's, less its numbering of pictures and its videos.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_tokens([*SPECIAL, VIDEO], special_tokens=True)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_tiny_skywork(folder: Path) -> None:
    """Write model, tokenizer, image processor and `value_head.safetensors`."""
    tokenizer = tiny_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in [*SPECIAL, VIDEO]}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 280,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    randomise(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 4096}
    Qwen2VLImageProcessorPil(size=size, patch_size=4, merge_size=2, temporal_patch_size=2).save_pretrained(folder)
    generator = torch.Generator().manual_seed(9)
    head = {
        "v_head.summary.weight": torch.randn(1, 64, generator=generator),
        "v_head.summary.bias": torch.tensor([0.7]),
    }
    save_file(head, folder / "value_head.safetensors")


def direct_score(folder: Path, messages: list[dict[str, Any]], images: list[Image.Image]) -> float:
    """Score by transformers: the whole model's last hidden state (after the final norm), at the last token."""
    from safetensors.torch import load_file

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    inputs: dict[str, Any] = {}
    if images:
        cut = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=images, return_tensors="pt")
        for grid in cut["image_grid_thw"]:
            text = text.replace("<|image_pad|>", "<|x|>" * (int(grid.prod()) // 4), 1)
        text = text.replace("<|x|>", "<|image_pad|>")
        inputs = {"pixel_values": cut["pixel_values"], "image_grid_thw": cut["image_grid_thw"]}
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if images:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, **inputs)
    head = load_file(folder / "value_head.safetensors")
    hidden = output.hidden_states[-1][0, -1]
    return float(head["v_head.summary.weight"][0] @ hidden + head["v_head.summary.bias"][0])
