"""Small stand-ins for real assets that the tests of several parts start from."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_r1v2.data.samples import ShardSample
from megatron_r1v2.data.shards import write_shards

# Qwen2's: every digit is a token of its own.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
REASONING_TOKENS = ("<think>", "</think>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
CORPUS = ("What is left + right? left 3, right 5, 3+5=8 user assistant system answer \\boxed{8}",)


def tiny_tokenizer(folder: str | Path, *, chat_template: str = CHAT_TEMPLATE) -> Path:
    """Save a byte-level BPE tokenizer that behaves as QwQ's: single digits, ChatML, prompts ending in "<think>\\n"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in REASONING_TOKENS])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=chat_template
    )
    wrapped.save_pretrained(str(folder))
    return Path(folder)


def name_qwen_tokenizer(folder: Path) -> None:
    """Name the class of Qwen's folders in a folder's tokenizer_config.json: one that can do without tokenizer.json."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    path.write_text(json.dumps(settings))


def split_tokenizer_json(folder: Path) -> None:
    """Replace tokenizer.json by vocab.json, merges.txt and added_tokens.json, as older folders have it."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    merges = "".join(f"{first} {second}\n" for first, second in whole["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    path = folder / "tokenizer_config.json"
    decoder = {str(token.pop("id")): token for token in (dict(token) for token in whole["added_tokens"])}
    settings = json.loads(path.read_text()) | {"added_tokens_decoder": decoder}
    path.write_text(json.dumps(settings))
    added = {token["content"]: int(number) for number, token in decoder.items()}
    (folder / "added_tokens.json").write_text(json.dumps(added))


def tiny_png(seed: int, *, width: int = 64, height: int = 32) -> bytes:
    """Encode an image of random pixels, the same for the same seed."""
    pixels = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def tiny_sample(index: int, **changes: Any) -> ShardSample:
    """Make the sample "digits-00INDEX": an image of two tiles, a question, its answer and facts."""
    left, right = index % 10, index // 10 % 10
    fields: dict[str, Any] = {
        "key": f"digits-{index:04d}",
        "messages": ({"role": "user", "content": "<image>\nWhat is left + right?"},),
        "answer": str(left + right),
        "answer_type": "numeric",
        "images": {"0.png": tiny_png(index)},
        "facts": {"left": str(left), "right": str(right)},
        "response": f"left {left}, right {right}, {left}+{right}={left + right}</think>\\boxed{{{left + right}}}",
    }
    return ShardSample(**{**fields, **changes})


def tiny_shards(folder: str | Path, count: int, *, samples_per_shard: int = 10) -> Path:
    """Write a data set of `tiny_sample`s."""
    write_shards((tiny_sample(index) for index in range(count)), folder, samples_per_shard)
    return Path(folder)
