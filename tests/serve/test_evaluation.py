"""A served model evaluated through its endpoint, by our evaluator and by lm-eval: as in process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1v2.config.schema import EvaluationConfig, RunConfig, RunRecipe
from megatron_r1v2.evaluation.endpoint_run import run_endpoint_evaluation
from megatron_r1v2.training.align import run_align
from megatron_r1v2.training.evaluation_run import run_evaluation
from tests.ranks import run_ranks
from tests.serve.running import recipe_of, served

RUNS = 2
# Enough that some answers are right and some are wrong, also greedily.
STEPS = 25


def train(root: Path) -> None:
    base = recipe_of(root)
    run_align(replace(base, train=replace(base.train, steps=STEPS, learning_rate=0.01)))


def recipe(root: Path, output: Path, **evaluation) -> RunRecipe:
    settings = {"runs": RUNS, "temperature": 0.0, **evaluation}
    base = recipe_of(root)
    return replace(
        base,
        run=RunConfig(output_dir=str(output)),
        model=replace(base.model, checkpoint=str(root / "run")),
        evaluation=EvaluationConfig(data=str(root / "data"), **settings),
    )


def rows_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "evaluation-e.rollouts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    run_ranks(1, train, root)
    return root


@pytest.fixture(scope="module")
def server(root):
    with served(root / "run", log=root / "server") as running:
        yield running


@pytest.fixture(scope="module")
def evaluated(root, server):
    """Return the folder and results of an evaluation in process and of one through the endpoint."""
    (in_process,) = run_ranks(1, run_evaluation, recipe(root, root / "in_process"), "e")
    endpoint = {"endpoint_url": f"{server.url}/v1", "endpoint_model": "tiny"}
    return root, in_process, run_endpoint_evaluation(recipe(root, root / "served", **endpoint), "e")


def test_our_evaluator_finds_the_same_through_the_endpoint(evaluated):
    folder, in_process, through_endpoint = evaluated
    assert in_process.num_prompts == 16
    assert 0 < in_process.pass_at_1 < 1, "a model that is always right or wrong shows nothing"
    for name in ("runs", "pass_at_1_interval", "pass_at_k", "maj_at_k", "format_rate", "hallucination_rate"):
        assert getattr(through_endpoint, name) == getattr(in_process, name)
    names = ("prompt_key", "sample_index", "text", "correct", "claims", "finish_reason", "response_tokens", "answer")
    assert [[row[name] for name in names] for row in rows_of(folder / "served")] == [
        [row[name] for name in names] for row in rows_of(folder / "in_process")
    ]


TASK = """\
task: boxed_made
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
num_fewshot: 0
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{until: [], do_sample: false, temperature: 0.0, max_gen_toks: 40}}
filter_list:
  - name: last_box
    filter:
      - function: regex
        regex_pattern: '\\\\boxed{{([01])}}'
        group_select: -1
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval_finds_the_same_accuracy_on_text_prompts(evaluated, server, tmp_path):
    folder, _, _ = evaluated
    rows = [row for row in rows_of(folder / "in_process") if row["image_png"] is None and row["sample_index"] == 0]
    assert len(rows) == 4
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({name: row[name] for name in ("question", "answer")}) + "\n" for row in rows))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "boxed_made.yaml").write_text(TASK.format(data=data))
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "local-chat-completions", "--model_args",
        f"model=tiny,base_url={server.url}/v1/chat/completions,num_concurrent=4", "--tasks", "boxed_made",
        "--include_path", str(tmp_path / "task"), "--apply_chat_template", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OPENAI_API_KEY": "secret"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(written.read_text())["results"]["boxed_made"]["exact_match,last_box"]
    assert found == pytest.approx(sum(row["correct"] for row in rows) / len(rows))
