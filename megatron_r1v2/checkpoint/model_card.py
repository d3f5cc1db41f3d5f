"""The README.md of an export: the model that it is, how it was made, how good it was, and how it is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_r1v2.checkpoint.hf.folders import JsonObject
from megatron_r1v2.checkpoint.hf.mapping import Layout
from megatron_r1v2.checkpoint.megatron.run_folder import RECIPE_FILE, STEP_FOLDER

CARD = "README.md"
_SNIPPET = """from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

folder = "FOLDER"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder, device_map="auto")
tiles = AutoImageProcessor.from_pretrained(folder)([Image.open("image.png")], return_tensors="pt").pixel_values
content = [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]
messages = [{"role": "user", "content": content}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
features = "<IMG_CONTEXT>" * (TOKENS * len(tiles))
prompt = prompt.replace("<IMG_CONTEXT>", f"<img>{features}</img>", 1)
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
output = model.generate(**inputs, pixel_values=tiles.to(model.device, model.dtype), max_new_tokens=256)
print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :]))"""
_HOW_TO_LOAD: Mapping[Layout, str] = {
    "transformers": f"""transformers 4.57 and 5 load it without code of this folder:

```python
{_SNIPPET}
```

`AutoProcessor.from_pretrained` does the same in one object, and needs torchvision (for videos) of the installed torch's
version and build.
vLLM serves it: `vllm serve FOLDER`.""",
    "chat": """The keys are those of OpenGVLab's InternVL and Skywork's R1V folders. They are read by the code that the
publishers have in such folders (`trust_remote_code`), which is not copied here; transformers' own classes and vLLM
0.32 do not read them. A folder that both load is written by
`python -m checkpoint_tools.hf_to_hf --hf FOLDER --layout transformers --output OUTPUT`.""",
}
_EVALUATION_KEYS = {
    "pass_at_1": "Pass@1",
    "format_rate": "format",
    "hallucination_rate": "hallucination rate",
    "claim_coverage": "claim coverage",
}


def model_card(
    checkpoint: Path, state: Mapping[str, Any], *, base: Path | None, layout: Layout, tokens_per_tile: int
) -> str:
    """Return the card of an exported checkpoint.

    Args:
        state: of its run (`load_state`).
        base: Hugging Face folder that the run started from; None: the checkpoint is a converted folder.
    """
    trained = ", ".join(state["trained"] or state["parts"])
    origin = f"the {trained} weights of `{checkpoint}` after step {state['step']}"
    rest = f", everything else from `{base}`" if base else ""
    lines = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", "tags: [megatron_r1v2]", "---"]
    lines += ["", f"# {(base or checkpoint).name} after step {state['step']}", "", f"Exported: {origin}{rest}."]
    figures = _figures(checkpoint, state)
    if figures:
        lines += ["", "## Evaluation", "", "| evaluation | figure | value |", "| --- | --- | --- |"]
        lines += [f"| {name} | {figure} | {value:.4f} |" for name, figure, value in figures]
    how = _HOW_TO_LOAD[layout].replace("TOKENS", str(tokens_per_tile))
    lines += ["", "## Loading", "", how]
    recipe = checkpoint / RECIPE_FILE
    if recipe.is_file():
        lines += ["", "## Recipe", "", "```yaml", recipe.read_text(encoding="utf-8").rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _figures(checkpoint: Path, state: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Return the figures that a run noted of these weights: name of the evaluation, figure, value."""
    if not STEP_FOLDER.match(checkpoint.name):
        return []
    run = checkpoint.parent.parent
    figures = []
    for path in sorted(run.glob("evaluation-*.json")):
        content = _json_object(path.read_text(encoding="utf-8"))
        if content.get("step") == state.get("version"):
            size, whole = content.get("num_prompts"), content.get("available")
            partial = (
                f" of {whole}, partial" if isinstance(size, int) and isinstance(whole, int) and size < whole else ""
            )
            name = f"{path.stem.removeprefix('evaluation-')}, {size} prompts{partial}"
            found = ((text, content.get(key)) for key, text in _EVALUATION_KEYS.items())
            figures += [(name, text, float(value)) for text, value in found if isinstance(value, (int, float))]
    for line in _lines(run / "metrics.jsonl"):
        if line.get("step") == state["step"]:
            found = ((key, value) for key, value in line.items() if key.startswith("validation/"))
            values = [("validation", key.split("/")[1], float(v)) for key, v in found if isinstance(v, (int, float))]
            # A step that was done again after an interruption has two lines: the last one holds.
            figures = [figure for figure in figures if figure[0] != "validation"] + values
    return figures


def _lines(path: Path) -> Iterator[JsonObject]:
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield _json_object(line)


def _json_object(text: str) -> JsonObject:
    """Return a JSON object; empty where a run that was killed has left something else."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
