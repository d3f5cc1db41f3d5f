"""The folder from which the 38B chain is submitted, with its recipes and scripts, and sizes of a tiny model."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, InternVLForConditionalGeneration

from checkpoint_tools import megatron_to_hf, reassemble
from megatron_r1v2.stages.align import run_align
from tests.stages.tiny_run import tiny_recipe, write_data

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "r1v2_38b"
STAGES = ("align", "pairs", "mpo", "grpo")
MODEL = "checkpoints/r1v2-38b-hf"
# Everything else stays: folders, the weights that each stage starts from, what trains, the terms of reward and loss.
SIZES: Mapping[str, Mapping[str, object]] = {
    "model": {"precision": "fp32"},
    "parallel": {"tensor": 1, "sequence": False},
    "data": {"max_prompt_tokens": 200, "max_tiles": 2},
    "generation": {
        "responses_per_prompt": 8,
        "max_response_tokens": 12,
        "kv_cache_gib": 0.05,
        "feature_cache_gib": 0.1,
    },
    "train": {"steps": 2, "prompts_per_step": 4, "tokens_per_microbatch": 512, "warmup_steps": 1},
    "evaluation": {"every_steps": 2, "prompts": 4},
    "logging": {"trackers": []},
}


def write_chain(folder: Path) -> None:
    """Write model, data, recipes and scripts where the chain expects them."""
    (folder / "slurm").mkdir(parents=True)
    for script in (ROOT / "slurm").glob("*.sh"):
        shutil.copy(script, folder / "slurm" / script.name)
    recipes = folder / RECIPES.relative_to(ROOT)
    recipes.mkdir(parents=True)
    for stage in STAGES:
        settings = yaml.safe_load((RECIPES / f"{stage}.yaml").read_text(encoding="utf-8"))
        for section, sizes in SIZES.items():
            given = settings.get(section, {})
            given |= {name: value for name, value in sizes.items() if name in given}
        (recipes / f"{stage}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    write_parts(folder)
    for name, images in (("align/train", 12), ("align/validation", 4), ("multimodal-math/train", 12)):
        write_data(folder / "data" / name, images=images, texts=0)
    for name in ("validation", "test"):
        write_data(folder / "data" / "multimodal-math" / name, images=4, texts=0, seed=1)


def write_parts(folder: Path) -> None:
    """Splice a vision tower and a language model, as the chain begins: the adapter between them is random."""
    parts = folder / "parts"
    whole, language = parts / "whole", parts / "language"
    # The language model must have learned to answer, as QwQ has: random weights give no response that a pair can use.
    recipe = tiny_recipe(parts, parts=("language",), steps=60, stage="align")
    run_align(recipe.changed(train=recipe.train.changed(learning_rate=0.01)))
    megatron_to_hf.main(["--checkpoint", str(parts / "run"), "--base", str(parts / "model"), "--output", str(whole)])
    model = InternVLForConditionalGeneration.from_pretrained(whole)
    alone = AutoModelForCausalLM.from_config(model.config.text_config)
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.lm_head.load_state_dict(model.lm_head.state_dict())
    alone.save_pretrained(language)
    AutoTokenizer.from_pretrained(whole).save_pretrained(language)
    reassemble.main(["--vision", str(whole), "--language", str(language), "--output", str(folder / MODEL)])


def commands(folder: Path) -> list[list[str]]:
    """Return the commands that the scripts of the chain start, in the order in which the pipeline submits them.

    Each is the name of a stage or command of `r1v2` with its arguments; the last is of megatron_to_hf.
    """
    pipeline = _one_line(folder / "slurm" / "pipeline_38b.sh")
    stages = re.search(r"stages=\(([\w ]+)\)", pipeline)[1].split()
    found = []
    for stage in stages[:-1]:
        script = _one_line(folder / "slurm" / f"{stage}_38b.sh")
        found.append(shlex.split(re.search(r"^launch (.*) \"\$@\"$", script, re.MULTILINE)[1]))
    export = re.search(r"command=\(slurm/convert_38b.sh (.*?)\)", pipeline)[1]
    return [*found, ["megatron_to_hf", *shlex.split(export)]]


def _one_line(script: Path) -> str:
    """Return a script with the lines joined that it has broken."""
    text = re.sub(r"\\\n\s*", "", script.read_text(encoding="utf-8"))
    return re.sub(r"(command=\([^)]*)\n\s*", r"\1 ", text)
