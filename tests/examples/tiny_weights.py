"""A tiny Llama as GGUF and a tiny DINOv2 as ONNX, made as the real files were: quantized, and by torch's exporter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from tokenizers import pre_tokenizers
from torch import nn
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_llama(*, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=len(tokens()),
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tokens() -> list[str]:
    """Return control tokens, bytes and two merges."""
    return [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ca", "cat"]


def interleaved(matrix: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Order the rows of a query or key matrix as llama.cpp's converter does."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: LlamaForCausalLM, changes: Mapping[str, Any] = {}) -> None:
    """Write a Llama quantized as SmolLM2's file is, and give the model the weights that the file now means.

    Args:
        path: the file.
        model: its matrices are rounded in place.
        changes: keys of the header to set otherwise (None: leave out), and "tensors" to add.
    """
    config = model.config
    header: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": 100000.0,
        "llama.rope.dimension_count": config.head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens(),
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(tokens()) - len(CONTROL)),
        "tokenizer.ggml.merges": ["c a", "ca t"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }
    changes = dict(changes)
    extra = changes.pop("tensors", {})
    header |= changes
    writer = gguf.GGUFWriter(path, header.pop("general.architecture"))
    for key, value in header.items():
        if value is not None:
            add_value(writer, key, value)
    for name, tensor in extra.items():
        writer.add_tensor(name, tensor)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stored = gguf_name(name)
            kind = stored.split(".")[-2]
            if parameter.ndim == 1:
                writer.add_tensor(stored, parameter.numpy())
                continue
            dtype = gguf.GGMLQuantizationType.Q8_0 if kind == "token_embd" else gguf.GGMLQuantizationType.Q4_1
            rounded = gguf.quants.quantize(parameter.numpy(), dtype)
            parameter.copy_(torch.from_numpy(gguf.quants.dequantize(rounded, dtype)))
            # Rows are quantized one by one, so their order does not matter to what they mean.
            writer.add_tensor(stored, interleaved(rounded, heads[kind]) if kind in heads else rounded, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def gguf_name(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module = name.removesuffix(".weight")
    if module in whole:
        return f"{whole[module]}.weight"
    _, _, layer, inside = module.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[inside]}.weight"


def random_dinov2() -> Dinov2Model:
    """Return a DINOv2 of two layers and two heads, with 4 x 4 positions."""
    torch.manual_seed(2)
    config = Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14
    )
    model = Dinov2Model(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


class Focus(nn.Module):
    """A network around a backbone, as the packaged file has one."""

    def __init__(self, backbone: Dinov2Model) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = nn.Linear(backbone.config.hidden_size, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.backbone(pixel_values=pixels).last_hidden_state)


def write_onnx(path: Path, model: nn.Module, side: int = 28) -> None:
    """Export a network for images of `side` pixels."""
    pixels = torch.zeros(1, 3, side, side)
    with torch.no_grad():
        torch.onnx.export(model, (pixels,), str(path), input_names=["input_image"], opset_version=14, dynamo=False)
