"""Print the greedy answer of an export to one image, with whichever transformers can be imported.

python tests/checkpoint/answers.py EXPORT [FOLDER with an older transformers]
"""

from __future__ import annotations

import json
import sys

if len(sys.argv) > 2:
    sys.path.insert(0, sys.argv[2])

import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
image = Image.linear_gradient("L").resize((64, 32)).convert("RGB")
tiles = AutoImageProcessor.from_pretrained(folder)(images=[image], return_tensors="pt")["pixel_values"]
content = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
)
prompt = prompt.replace("<IMG_CONTEXT>", "<img>" + "<IMG_CONTEXT>" * 16 * len(tiles) + "</img>", 1)
inputs = tokenizer(prompt, return_tensors="pt")
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
with torch.no_grad():
    output = model.generate(
        **inputs,
        pixel_values=tiles,
        max_new_tokens=12,
        do_sample=False,
    )
prompt_ids = inputs["input_ids"][0].tolist()
found = {"prompt": prompt_ids, "answer": output[0, len(prompt_ids) :].tolist()}
print(json.dumps({"version": transformers.__version__, **found, "tiles": float(tiles.double().sum())}))
