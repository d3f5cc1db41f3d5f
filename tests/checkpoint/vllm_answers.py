"""Print the greedy answer of an export to one image, with vLLM: run by a Python that has it.

python tests/checkpoint/vllm_answers.py EXPORT
"""

from __future__ import annotations

import json
import sys

import vllm
from PIL import Image


def main(folder: str) -> None:
    """Ask as `answers.py` does; vLLM would round to 16 bits by itself."""
    engine = vllm.LLM(folder, dtype="float32", enforce_eager=True, max_model_len=512, limit_mm_per_prompt={"image": 1})
    image = Image.linear_gradient("L").resize((64, 32)).convert("RGB")
    content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": "what is it?"}]
    sampling = vllm.SamplingParams(temperature=0, max_tokens=12)
    (answer,) = engine.chat([{"role": "user", "content": content}], sampling)
    found = {"prompt": list(answer.prompt_token_ids), "answer": list(answer.outputs[0].token_ids)}
    print(json.dumps({"version": vllm.__version__, **found}))


if __name__ == "__main__":
    main(sys.argv[1])
