"""A served model evaluated through its endpoint, by our evaluator and by lm-eval: as in process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.digits.verify_endpoint import LmEvalTask, lm_eval_python, run_lm_eval
from megatron_r1v2.config.recipes import EvaluateRecipe
from megatron_r1v2.config.schema import EvaluationConfig, RunConfig
from megatron_r1v2.data.messages import openai_messages
from megatron_r1v2.data.samples import parse_sample
from megatron_r1v2.data.stream import read_shards
from megatron_r1v2.stages.align import run_align
from megatron_r1v2.stages.endpoint_evaluation import run_endpoint_evaluation
from megatron_r1v2.stages.evaluate import run_evaluation
from tests.ranks import run_ranks
from tests.serve.running import RESPONSE_TOKENS, ask, recipe_of, served

RUNS = 2
# Enough that some answers are right and some are wrong, also greedily.
STEPS = 25


def train(root: Path) -> None:
    base = recipe_of(root)
    run_align(base.changed(train=base.train.changed(steps=STEPS, learning_rate=0.01)))


def recipe(root: Path, output: Path, **evaluation) -> EvaluateRecipe:
    settings = {"runs": RUNS, "temperature": 0.0, **evaluation}
    base = recipe_of(root)
    return EvaluateRecipe(
        run=RunConfig(output_dir=str(output)),
        model=base.model.changed(checkpoint=str(root / "run")),
        data=base.data,
        generation=base.generation,
        reward=base.reward,
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
    # Parted by the server, put together again by our evaluator.
    with served(root / "run", "--reasoning-ends", "</think>", log=root / "server") as running:
        yield running


@pytest.fixture(scope="module")
def evaluated(root, server):
    """Return the folder and results of an evaluation in process and of one through the endpoint."""
    (in_process,) = run_ranks(1, run_evaluation, recipe(root, root / "in_process"), "e")
    endpoint = {"endpoint_url": f"{server.url}/v1", "endpoint_model": "tiny"}
    return root, in_process, run_endpoint_evaluation(recipe(root, root / "served", **endpoint), "e")


def test_reasoning_and_answer_are_told_apart_streamed_or_not(root, server, evaluated):
    rows = {row["prompt_key"]: row for row in rows_of(root / "in_process")}
    client = server.client()
    ended = {True: 0, False: 0}
    for sample in list(read_shards(str(root / "data"), parse_sample, count=0)):
        messages = openai_messages(sample.messages, list(sample.images.values()))
        reasoning, found, answer = rows[sample.key]["text"].partition("</think>")
        message = ask(client, messages, temperature=0).choices[0].message
        assert (message.reasoning_content, message.content) == (reasoning, answer if found else None)
        deltas = [chunk.choices[0].delta for chunk in ask(client, messages, temperature=0, stream=True)]
        assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == reasoning
        assert "".join(delta.content or "" for delta in deltas) == answer
        ended[bool(found)] += 1
    assert ended[True], "a model that never ends its reasoning shows nothing"


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


@pytest.mark.slow
@pytest.mark.skipif(lm_eval_python() is None, reason="no lm-eval: run `make harness-test`")
def test_lm_eval_sees_the_same_images_and_finds_the_same(evaluated, server, tmp_path):
    folder, _, _ = evaluated
    rows = {row["prompt_key"]: row for row in rows_of(folder / "in_process") if row["sample_index"] == 0}
    task = LmEvalTask("shards", max_tokens=RESPONSE_TOKENS, metadata={"shards": str(folder / "data")})
    results, found = run_lm_eval(lm_eval_python(), task, tmp_path, url=f"{server.url}/v1", model="tiny")
    assert sum(bool(row["doc"]["images"]) for row in found) == 12
    # lm-eval has words of its own for an answer that is not there.
    answers = {key: row["text"].partition("</think>")[2] for key, row in rows.items() if "</think>" in row["text"]}
    assert answers
    assert {row["doc"]["key"]: row["resps"][0][0] for row in found if row["doc"]["key"] in answers} == answers
    right = sum(rows[key]["correct"] for key in answers)
    assert results["exact_match,last_box"] == pytest.approx(right / len(rows))
