"""The card of an export: what it says, and that its snippet runs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from checkpoint_tools import megatron_to_hf
from megatron_r1v2.checkpoint.model_card import CARD, model_card
from tests.checkpoint.damage import fresh, run
from tests.ranks import run_ranks

STATE = {"step": 7, "version": 6, "parts": ["adapter"], "trained": ["adapter"]}


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint in a run that was validated and evaluated."""
    folder = tmp_path / "run" / "checkpoints" / "step-00000007"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("run:\n  stage: grpo\n")
    run_folder = tmp_path / "run"
    (run_folder / "metrics.jsonl").write_text(
        '{"step": 6, "validation/pass_at_1": 0.1}\n{"step": 7, "validation/pass_at_1": 0.2, "loss": 1}\n'
        '{"step": 7, "validation/pass_at_1": 0.25}\n{"step": 8, "valid'
    )
    evaluation = {"step": 6, "pass_at_1": 0.75, "hallucination_rate": None, "format_rate": 1.0, "num_prompts": 50}
    (run_folder / "evaluation-after.json").write_text(json.dumps(evaluation))
    part = {**evaluation, "pass_at_1": 0.625, "available": 900}
    (run_folder / "evaluation-mmmu.json").write_text(json.dumps(part))
    (run_folder / "evaluation-before.json").write_text(json.dumps({**evaluation, "step": 0, "pass_at_1": 0.5}))
    return folder


def test_base_recipe_step_and_the_figures_of_these_weights_are_in_it(checkpoint, tmp_path):
    card = model_card(checkpoint, STATE, base=tmp_path / "base", layout="transformers", tokens_per_tile=16)
    assert "# base after step 7" in card
    assert f"the adapter weights of `{checkpoint}` after step 7, everything else from `{tmp_path / 'base'}`." in card
    assert "| after, 50 prompts | Pass@1 | 0.7500 |" in card
    assert "| after, 50 prompts | format | 1.0000 |" in card
    assert "| mmmu, 50 prompts of 900, partial | Pass@1 | 0.6250 |" in card
    assert "| validation | pass_at_1 | 0.2500 |" in card
    assert "0.5000" not in card
    assert "0.2000" not in card
    assert "hallucination" not in card
    assert "```yaml\nrun:\n  stage: grpo\n```" in card
    assert "AutoModelForImageTextToText" in card


def test_what_is_not_known_is_left_out(checkpoint):
    bare = fresh(checkpoint, checkpoint.parents[2] / "elsewhere")
    (bare / "recipe.yaml").unlink()
    card = model_card(bare, {**STATE, "trained": []}, base=None, layout="chat", tokens_per_tile=16)
    assert "## Evaluation" not in card
    assert "## Recipe" not in card
    assert "trust_remote_code" in card
    assert "AutoModelForImageTextToText" not in card


def run_code(code: str, folder: Path) -> str:
    """Run code in a folder, with no names but its own, and return what it prints."""
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {"__name__": "__main__"})
    return printed.getvalue()


def test_the_snippet_of_an_export_runs(made, tmp_path):
    run(megatron_to_hf, "--checkpoint", made / "run", "--output", tmp_path / "out", "--quiet")
    card = (tmp_path / "out" / CARD).read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    Image.linear_gradient("L").resize((64, 32)).convert("RGB").save(tmp_path / "image.png")
    code = code.replace("FOLDER", str(tmp_path / "out"))  # nothing else: it must run as it is written
    (printed,) = run_ranks(1, run_code, code, tmp_path)
    assert printed.strip()
