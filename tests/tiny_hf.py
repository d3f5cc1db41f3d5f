"""Tiny Hugging Face models, random in every parameter: what the tests of every part start from.

Nothing here is downloaded. Zeros and ones (fresh biases, norms, layer scales) would hide a swapped parameter, so every
parameter is drawn again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    InternVLVisionModel,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

Family = Literal["300m", "6b"]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def tiny_byte_tokenizer(*, image_tokens: bool = True) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer without merges: 256 bytes and the special tokens (265 ids, 261 without images)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    extra = IMAGE_TOKENS if image_tokens else {}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=dict(extra),
    )
    fast.add_tokens(["<|im_start|>"], special_tokens=True)
    fast.add_tokens(["<think>", "</think>"])
    if image_tokens:
        fast.add_tokens(list(IMAGE_TOKENS.values()), special_tokens=True)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_vision_config(
    family: Family = "300m",
    *,
    heads: int = 4,
    head_size: int = 16,
    layers: int = 2,
    image_size: int = 32,
    patch: int = 4,
) -> InternVLVisionConfig:
    """Return an InternViT of the 300M family (LayerNorm, qkv bias) or the 6B family (RMSNorm, QK norm)."""
    six_b = family == "6b"
    return InternVLVisionConfig(
        hidden_size=heads * head_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * heads * head_size,
        image_size=image_size,
        patch_size=patch,
        attention_bias=not six_b,
        use_qk_norm=six_b,
        norm_type="rms_norm" if six_b else "layer_norm",
    )


def tiny_text_config(
    *, tied: bool = False, vocab_size: int = 300, hidden: int = 96, layers: int = 2, heads: int = 4, kv_heads: int = 2
) -> Qwen2Config:
    """Return a Qwen2 with grouped query attention."""
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=2 * hidden,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-6,
        bos_token_id=None,
    )


def randomise(model: torch.nn.Module, *, seed: int = 0, scale: float = 0.02) -> None:
    """Draw every parameter again, gains (norms, layer scales) around one and everything else around zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            is_gain = name.endswith(("norm.weight", "norm_before.weight", "norm_after.weight", "layernorm.weight"))
            centre = 1.0 if is_gain else 0.5 if "lambda_" in name else 0.0
            spread = 0.2 if is_gain or "lambda_" in name or parameter.ndim == 1 else scale * 3
            values = torch.randn(parameter.shape, generator=generator) * spread + centre
            parameter.copy_(values.to(parameter.dtype))


def tiny_hf_model(
    folder: Path | str,
    family: Family = "300m",
    *,
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vision: InternVLVisionConfig | None = None,
    text: PretrainedConfig | None = None,
    max_shard_size: str = "5GB",
) -> InternVLForConditionalGeneration:
    """Write a whole random InternVL folder (weights, tokenizer, image processor) and return its model.

    Args:
        folder: made when it is not there.
        family: which InternViT.
        tied: whether output and input embeddings are one.
        seed: of the weights.
        dtype: of the weights.
        vision: instead of `tiny_vision_config(family)` (64 wide, 2 layers, 64 patches, 16 image tokens a tile).
        text: instead of `tiny_text_config(tied=tied)` (96 wide, 2 layers, 4 heads, 2 kv heads, vocabulary 300).
        max_shard_size: small values, such as "200KB", give several shards and an index.
    """
    vision = vision or tiny_vision_config(family)
    text = text or tiny_text_config(tied=tied)
    tokenizer = tiny_byte_tokenizer()
    text.eos_token_id = tokenizer.eos_token_id
    text.pad_token_id = tokenizer.pad_token_id
    side = vision.image_size[0] // vision.patch_size[0]
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=side * side // 4,
        downsample_ratio=0.5,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    model = InternVLForConditionalGeneration(config)
    model.tie_weights()
    randomise(model, seed=seed)
    model = model.to(dtype).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    size = {"height": vision.image_size[0], "width": vision.image_size[0]}
    GotOcr2ImageProcessorPil(
        size=size,
        crop_to_patches=True,
        min_patches=1,
        max_patches=2,
        image_mean=[0.485, 0.456, 0.406],  # ImageNet's; the class defaults to CLIP's
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def tiny_hf_vision(folder: Path | str, family: Family = "300m", *, seed: int = 1, dtype: torch.dtype = torch.float32):
    """Write a vision tower alone, as an `internvl_vision` folder, and return its model."""
    model = InternVLVisionModel(tiny_vision_config(family))
    randomise(model, seed=seed)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    return model


def tiny_hf_language(
    folder: Path | str,
    *,
    tied: bool = False,
    vocab_size: int = 300,
    seed: int = 2,
    dtype: torch.dtype = torch.float32,
    image_tokens: bool = False,
):
    """Write a Qwen2 with its tokenizer, which knows the image tokens or not, and return the model."""
    tokenizer = tiny_byte_tokenizer(image_tokens=image_tokens)
    text = tiny_text_config(tied=tied, vocab_size=vocab_size)
    text.eos_token_id = tokenizer.eos_token_id
    text.pad_token_id = tokenizer.pad_token_id
    model = Qwen2ForCausalLM(text)
    randomise(model, seed=seed)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
