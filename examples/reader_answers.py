"""Greedy answers of an exported folder to pictures, by transformers or vLLM: run by a Python that has it, and no more.

python examples/reader_answers.py transformers|vllm EXPORT QUESTIONS MAX_TOKENS

QUESTIONS is a JSON list of {"key", "text", "image"}, the image a file; answers by key are printed as one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image

Question = dict[str, str]


def ask_transformers(folder: str, questions: list[Question], max_tokens: int) -> tuple[str, dict[str, str]]:
    """Return the version and the answers of transformers, asked as the model card of an export shows."""
    import torch
    import transformers
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    answers = {}
    for question in questions:
        tiles = processor([Image.open(question["image"]).convert("RGB")], return_tensors="pt").pixel_values
        content = [{"type": "image"}, {"type": "text", "text": question["text"]}]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        features = "<IMG_CONTEXT>" * (model.config.image_seq_length * len(tiles))
        prompt = prompt.replace("<IMG_CONTEXT>", f"<img>{features}</img>", 1)
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, pixel_values=tiles, max_new_tokens=max_tokens, do_sample=False)
        answers[question["key"]] = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return transformers.__version__, answers


def ask_vllm(folder: str, questions: list[Question], max_tokens: int) -> tuple[str, dict[str, str]]:
    """Return the version and the answers of vLLM; without a dtype it would round to 16 bits."""
    import vllm

    limit = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["text_config"]
    engine = vllm.LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=min(limit["max_position_embeddings"], 4096),
        limit_mm_per_prompt={"image": 1},
    )
    chats = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_pil", "image_pil": Image.open(question["image"]).convert("RGB")},
                    {"type": "text", "text": question["text"]},
                ],
            }
        ]
        for question in questions
    ]
    outputs = engine.chat(chats, vllm.SamplingParams(temperature=0, max_tokens=max_tokens))
    answers = {question["key"]: output.outputs[0].text for question, output in zip(questions, outputs, strict=True)}
    return vllm.__version__, answers


def main(reader: str, folder: str, questions: str, max_tokens: str) -> None:
    """Ask the questions of a file, and print the answers."""
    ask = {"transformers": ask_transformers, "vllm": ask_vllm}[reader]
    version, answers = ask(folder, json.loads(Path(questions).read_text(encoding="utf-8")), int(max_tokens))
    print(json.dumps({"version": version, "answers": answers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
