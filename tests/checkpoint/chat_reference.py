"""The chat layout as its publishers have it, written without our table: tensors, config.json, and what they compute."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from megatron_r1v2.resilience.files import write_json
from tests.tiny_hf import tiny_byte_tokenizer, tiny_text_config

WIDTH, HEADS, LAYERS, FFN, SIDE, PATCH, TEXT = 64, 4, 2, 128, 32, 4, 96


def write_chat_folder(folder: Path, *, family: str, version: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write a random folder of the chat layout, 6b or 300m; return its tensors."""
    folder.mkdir()
    six_b = family == "6b"
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, gain: bool = False) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * (0.2 if gain else 0.06) + (1.0 if gain else 0.0)

    tensors = {
        "vision_model.embeddings.class_embedding": draw(1, 1, WIDTH),
        "vision_model.embeddings.patch_embedding.weight": draw(WIDTH, 3, PATCH, PATCH),
        "vision_model.embeddings.patch_embedding.bias": draw(WIDTH),
        "vision_model.embeddings.position_embedding": draw(1, (SIDE // PATCH) ** 2 + 1, WIDTH),
    }
    for n in range(LAYERS):
        at = f"vision_model.encoder.layers.{n}."
        tensors |= {f"{at}attn.qkv.weight": draw(3 * WIDTH, WIDTH), f"{at}attn.proj.weight": draw(WIDTH, WIDTH)}
        tensors |= {f"{at}attn.proj.bias": draw(WIDTH), f"{at}ls1": draw(WIDTH, gain=True)}
        tensors |= {f"{at}mlp.fc1.weight": draw(FFN, WIDTH), f"{at}mlp.fc1.bias": draw(FFN)}
        tensors |= {f"{at}mlp.fc2.weight": draw(WIDTH, FFN), f"{at}mlp.fc2.bias": draw(WIDTH)}
        tensors |= {f"{at}ls2": draw(WIDTH, gain=True)}
        tensors |= {f"{at}norm{i}.weight": draw(WIDTH, gain=True) for i in (1, 2)}
        if six_b:
            tensors |= {f"{at}attn.{x}_norm.weight": draw(WIDTH, gain=True) for x in "qk"}
        else:
            tensors |= {f"{at}norm{i}.bias": draw(WIDTH) for i in (1, 2)}
            tensors |= {f"{at}attn.qkv.bias": draw(3 * WIDTH)}
    tensors |= {"mlp1.0.weight": draw(4 * WIDTH, gain=True), "mlp1.0.bias": draw(4 * WIDTH)}
    tensors |= {"mlp1.1.weight": draw(TEXT, 4 * WIDTH), "mlp1.1.bias": draw(TEXT)}
    tensors |= {"mlp1.3.weight": draw(TEXT, TEXT), "mlp1.3.bias": draw(TEXT)}
    tensors |= {"language_model.model.embed_tokens.weight": draw(300, TEXT)}
    for n in range(2):
        at = f"language_model.model.layers.{n}."
        for name, rows in {"q": TEXT, "k": TEXT // 2, "v": TEXT // 2}.items():
            tensors |= {f"{at}self_attn.{name}_proj.weight": draw(rows, TEXT)}
            tensors |= {f"{at}self_attn.{name}_proj.bias": draw(rows)}
        tensors |= {f"{at}self_attn.o_proj.weight": draw(TEXT, TEXT)}
        tensors |= {f"{at}mlp.{name}_proj.weight": draw(2 * TEXT, TEXT) for name in ("gate", "up")}
        tensors |= {f"{at}mlp.down_proj.weight": draw(TEXT, 2 * TEXT)}
        tensors |= {f"{at}{name}_layernorm.weight": draw(TEXT, gain=True) for name in ("input", "post_attention")}
    tensors |= {"language_model.model.norm.weight": draw(TEXT, gain=True)}
    tensors |= {"language_model.lm_head.weight": draw(300, TEXT)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = tiny_byte_tokenizer()
    tokenizer.save_pretrained(folder)
    text = {**tiny_text_config().to_dict(), "architectures": ["Qwen2ForCausalLM"], "rope_theta": 10000.0}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    write_json(folder / "config.json", chat_json(text, six_b=six_b, version=version))
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    write_json(folder / "preprocessor_config.json", {"crop_size": SIDE, "size": SIDE, **statistics})
    return tensors


def chat_json(text: dict, *, six_b: bool, version: str) -> dict:
    return {
        "architectures": ["SkyworkR1VChatModel"],
        "auto_map": {"AutoModel": "modeling_skywork_chat.SkyworkR1VChatModel"},
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": SIDE,
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "ps_version": version,
        "select_layer": -1,
        "template": "skywork-r1v",
        "torch_dtype": "float32",
        "use_thumbnail": True,
        "llm_config": text,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS,
            "intermediate_size": FFN,
            "image_size": SIDE,
            "patch_size": PATCH,
            "hidden_act": "gelu",
            "norm_type": "rms_norm" if six_b else "layer_norm",
            "layer_norm_eps": 1e-6,
            "qkv_bias": not six_b,
            "qk_normalization": six_b,
            "initializer_factor": 0.1,
        },
    }


def image_embeddings(tensors: dict[str, torch.Tensor], pixels: torch.Tensor, *, family: str, version: str):
    """Compute what the published code does with the tensors, up to the language model's embeddings [tiles, F, H]."""
    six_b = family == "6b"

    def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    v = {name.removeprefix("vision_model."): value for name, value in tensors.items()}
    x = F.conv2d(pixels, v["embeddings.patch_embedding.weight"], v["embeddings.patch_embedding.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([v["embeddings.class_embedding"].expand(len(x), -1, -1), x], 1) + v["embeddings.position_embedding"]
    for n in range(LAYERS):
        w = {name.removeprefix(f"encoder.layers.{n}."): value for name, value in v.items()}

        def norm(x: torch.Tensor, i: int, w: dict = w) -> torch.Tensor:
            if six_b:
                return rms(x, w[f"norm{i}.weight"])
            return F.layer_norm(x, (WIDTH,), w[f"norm{i}.weight"], w[f"norm{i}.bias"], 1e-6)

        query, key, value = F.linear(norm(x, 1), w["attn.qkv.weight"], w.get("attn.qkv.bias")).chunk(3, dim=-1)
        if six_b:
            query, key = rms(query, w["attn.q_norm.weight"]), rms(key, w["attn.k_norm.weight"])
        split = [t.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2) for t in (query, key, value)]
        attended = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        x = x + w["ls1"] * F.linear(attended, w["attn.proj.weight"], w["attn.proj.bias"])
        hidden = F.gelu(F.linear(norm(x, 2), w["mlp.fc1.weight"], w["mlp.fc1.bias"]))
        x = x + w["ls2"] * F.linear(hidden, w["mlp.fc2.weight"], w["mlp.fc2.bias"])
    x = x[:, 1:]
    side = SIDE // PATCH
    x = (
        x.reshape(len(x), side, side // 2, 2 * WIDTH)
        .permute(0, 2, 1, 3)
        .reshape(len(x), side // 2, side // 2, 4 * WIDTH)
    )
    x = (x.permute(0, 2, 1, 3) if version == "v2" else x).reshape(len(x), -1, 4 * WIDTH)
    x = F.layer_norm(x, (4 * WIDTH,), tensors["mlp1.0.weight"], tensors["mlp1.0.bias"], 1e-5)
    x = F.gelu(F.linear(x, tensors["mlp1.1.weight"], tensors["mlp1.1.bias"]))
    return F.linear(x, tensors["mlp1.3.weight"], tensors["mlp1.3.bias"])
