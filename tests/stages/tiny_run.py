"""A whole run in miniature: a random model whose few words make right answers and mixed groups likely."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_r1v2.config.choices import StageName
from megatron_r1v2.config.recipes import STAGES, Recipe
from megatron_r1v2.data.samples import ShardSample
from megatron_r1v2.data.shards import write_shards
from tests.tiny_hf import CHAT_TEMPLATE, IMAGE_TOKENS, tiny_hf_model

WORDS = ["</think>", "\\boxed{0}", "\\boxed{1}", "left 3, ", "left 4, "]


def write_model(folder: Path, *, family: Any = "300m", seed: int = 0, tied: bool = False) -> None:
    """Write a random model whose tokenizer has few words, `\\boxed{0}` and `\\boxed{1}` among them."""
    tiny_hf_model(folder, family, seed=seed, tied=tied)
    symbols = ["<unk>", *(chr(code) for code in range(97, 105)), "\n", " ", "?"]
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=dict(IMAGE_TOKENS),
    )
    fast.add_tokens(["<|im_start|>"], special_tokens=True)
    fast.add_tokens(["<think>", *WORDS])
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["image_token_id"] = fast.convert_tokens_to_ids("<IMG_CONTEXT>")
    path.write_text(json.dumps(config))


def write_data(folder: Path, *, images: int = 12, texts: int = 4, seed: int = 0) -> None:
    """Write shards of random pictures, each with an answer, a response and a pair, and some text-only prompts.

    The margin of pair i is i / 10; the rejected response is longer and has the other answer.
    """
    generator = np.random.default_rng(seed)
    samples = []
    for index in range(images + texts):
        has_image = index % (images + texts) < images
        content = ("<image>\n" if has_image else "") + "abcdefgh"[: 2 + index % 6] + "?"
        size = (32, 64, 3) if index % 2 else (32, 32, 3)
        picture = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, size, dtype=np.uint8)).save(picture, format="PNG")
        answer = str(index % 2)
        samples.append(
            ShardSample(
                key=f"sample-{index:03d}",
                messages=({"role": "user", "content": content},),
                answer=answer,
                answer_type="exact",
                facts={"left": "3"},
                images={"0.png": picture.getvalue()} if has_image else {},
                response=f"left 3, </think>\\boxed{{{answer}}}",
                chosen=f"left 3, </think>\\boxed{{{answer}}}",
                rejected=f"left 4, left 3, </think>\\boxed{{{1 - index % 2}}}",
                margin=index / 10,
                source="test",
            )
        )
    write_shards(samples, folder)


def tiny_recipe(root: Path, *, parts: tuple[str, ...] = ("adapter",), steps: int = 3, stage: str = "grpo") -> Recipe:
    """Return settings of a run on the model and data below `root` (made when they are not there)."""
    if not (root / "model").exists():
        write_model(root / "model")
        write_data(root / "data")
    sections = {
        "run": {"output_dir": str(root / "run"), "seed": 7},
        "model": {"hf_path": str(root / "model"), "precision": "fp32"},
        "data": {"train": str(root / "data"), "max_prompt_tokens": 200, "max_tiles": 2},
        "generation": {
            "responses_per_prompt": 4,
            "max_response_tokens": 6,
            "kv_cache_gib": 0.05,
            "max_requests": 64,
            "max_tokens_per_step": 512,
            "feature_cache_gib": 0.1,
        },
        "reward": {"claim_pattern": r"(?P<name>left) (?P<value>\d)"},
        # Each step notes the same metrics, also where another process goes on.
        "algorithm": {"gate_every": 1},
        "train": {
            "parts": parts,
            "steps": steps,
            "prompts_per_step": 6,
            "tokens_per_microbatch": 256,
            "learning_rate": 1e-3,
        },
        "checkpoint": {"every_steps": 1, "keep_last": 10, "asynchronous": False},
        "evaluation": {"runs": 2},
    }
    kind = STAGES[StageName(stage)]
    if stage == "reward_model":
        sections["train"]["parts"] = (*parts, "score")
    return kind.model_validate(
        {name: section(**sections[name]) for name, section in kind.sections().items() if name in sections}
    )
