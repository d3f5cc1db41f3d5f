"""Models and prompts of benchmarks/step_vs_trl.py: made once in its work folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
from PIL import Image
from transformers import AutoTokenizer, Qwen2Config

from benchmarks.step_cases import SIZES, TEXT_TOKENS, Case
from megatron_r1v2.data.samples import ShardSample
from megatron_r1v2.data.shards import write_shards
from tests.tiny_hf import randomise, tiny_hf_model, tiny_vision_config

VOCABULARY = 8192
_PROMPTS = 64


def make_materials(work: Path, case: Case, demo: Path | None) -> None:
    """Make the model and the prompts of a case, unless they are there.

    Args:
        demo: the folder of `make demo`, for its cases.
    """
    if case.model == "demo":
        assert demo is not None, "--demo: the folder of make demo"
        _make_demo(work, case, demo)
        return
    if not (work / "33m-model-without-end").exists():
        _make_model(work / "33m-model")
        _without_end(work / "33m-model", work / "33m-model-without-end")
    if not (work / case.data).exists():
        _make_prompts(work / case.data, case.tiles)


def _make_model(folder: Path) -> None:
    """Write a random InternVL of 33 M parameters: hidden 512, 8 layers, vocabulary 8192, tiles of 64 tokens."""
    text = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1536,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
    )
    model = tiny_hf_model(folder, text=text, vision=tiny_vision_config(image_size=64))
    # Nearly uniform logits: responses differ, and none ends early.
    randomise(model, scale=0.005)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<w{number}>" for number in range(VOCABULARY - len(tokenizer))])
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_patches": 15}))
    tokenizer.save_pretrained(folder)


def _without_end(model: Path, folder: Path) -> None:
    """Copy a model; nothing that it draws ends a response of the copy, but for a token of videos."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text()) | {"eos_token_id": tokenizer.convert_tokens_to_ids("<video>")}
    path.write_text(json.dumps(settings))


def _make_prompts(folder: Path, tiles: int) -> None:
    """Write pictures of noise and questions of bytes, as shards and as files for the peers."""
    (folder / "images").mkdir(parents=True)
    generator = numpy.random.default_rng(tiles)
    width, height = SIZES[tiles]
    samples, prompts = [], []
    for number in range(_PROMPTS):
        picture = folder / "images" / f"{number}.png"
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=numpy.uint8)).save(picture)
        # The rest is the template's.
        text = "".join(generator.choice(list("abcdefgh "), TEXT_TOKENS - 30))
        key = f"prompt-{number:03d}"
        prompts.append({"key": key, "text": text, "image": str(picture), "answer": "0"})
        samples.append(
            ShardSample(
                key=key,
                messages=({"role": "user", "content": f"<image>\n{text}"},),
                answer="0",
                answer_type="numeric",
                images={"0.png": picture.read_bytes()},
            )
        )
    write_shards(iter(samples), folder / "shards", _PROMPTS)
    (folder / "prompts.json").write_text(json.dumps(prompts))


def _make_demo(work: Path, case: Case, demo: Path) -> None:
    """Take the export of the demo's model before GRPO, and its questions."""
    if not (work / "demo-model-without-end").exists():
        shutil.copytree(demo / "export", work / "demo-model", dirs_exist_ok=True)
        _without_end(work / "demo-model", work / "demo-model-without-end")
    if (work / case.data).exists():
        return
    rows = [json.loads(line) for line in (demo / "data" / "grpo.jsonl").read_text().splitlines()]
    (work / case.data).mkdir()
    shutil.copytree(demo / "shards" / "grpo", work / case.data / "shards")
    prompts = [
        {
            "key": str(number),
            "text": row["messages"][0]["content"].removeprefix("<image>\n"),
            "image": str(demo / "data" / "images" / row["images"][0]),
            "answer": row["answer"],
        }
        for number, row in enumerate(rows)
    ]
    (work / case.data / "prompts.json").write_text(json.dumps(prompts))
