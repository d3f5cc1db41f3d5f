"""The evaluate command: the weights it takes, and the same numbers whenever it is asked."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1v2.data.samples import parse_sample
from megatron_r1v2.data.shards import write_shards
from megatron_r1v2.data.stream import read_shards
from megatron_r1v2.evaluation.response_rows import Evaluation
from megatron_r1v2.stages import evaluate
from megatron_r1v2.stages.endpoint_evaluation import run_endpoint_evaluation
from megatron_r1v2.stages.evaluate import run_evaluation
from megatron_r1v2.stages.loaded_model import open_model
from tests.ranks import run_ranks
from tests.stages.runs import recipe_for, run_stage
from tests.stages.tiny_run import write_data


def test_an_evaluation_is_written_and_comes_out_the_same_again(root: Path, tmp_path: Path) -> None:
    recipe = recipe_for(
        root, tmp_path / "run", (f"evaluation.data={root / 'data'}", "evaluation.prompts=6"), stage="evaluate"
    )
    first = run_evaluation(recipe, "before")
    written = json.loads((tmp_path / "run" / "evaluation-before.json").read_text())
    assert written["pass_at_1"] == first.pass_at_1
    assert (written["num_prompts"], len(written["runs"]), written["step"]) == (6, 2, 0)
    lines = (tmp_path / "run" / "evaluation-before.rollouts.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert sum(record["correct"] for record in records) / len(records) == pytest.approx(first.pass_at_1)
    assert (written["data"], written["available"]) == (str(root / "data"), 16)
    second = run_evaluation(recipe, "again")
    assert (second.runs, second.mean_response_tokens) == (first.runs, first.mean_response_tokens)
    assert (tmp_path / "run" / "evaluation-again.rollouts.jsonl").read_text().splitlines() == lines


def test_a_checkpoint_is_evaluated_at_its_step(root: Path, tmp_path: Path) -> None:
    overrides = ("train.steps=12", "train.learning_rate=0.01", "checkpoint.every_steps=0", "train.parts=[language]")
    align = run_stage(recipe_for(root, tmp_path / "align", overrides, stage="align"))
    data = f"evaluation.data={root / 'data'}"
    before = run_evaluation(recipe_for(root, tmp_path / "run", (data,), stage="evaluate"), "before")
    after = run_evaluation(
        recipe_for(root, tmp_path / "run", (data, f"model.checkpoint={align}"), stage="evaluate"), "after"
    )
    assert after.step == 12
    assert (before.size, after.available) == ("n = 16", 16)
    kept = (tmp_path / "run" / "evaluation-before.json").read_bytes()
    with pytest.raises(ValueError, match="evaluation-before.json is the result of another evaluation: model was"):
        run_evaluation(
            recipe_for(root, tmp_path / "run", (data, f"model.checkpoint={align}"), stage="evaluate"), "before"
        )
    assert (tmp_path / "run" / "evaluation-before.json").read_bytes() == kept
    assert after.pass_at_1 > before.pass_at_1
    assert after.format_rate > 0.5


def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_bytes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (f"evaluation.data={root / 'data'}", "evaluation.prompts=5")
    whole = run_evaluation(recipe_for(root, tmp_path / "whole", data, stage="evaluate"), "e")
    monkeypatch.setattr(evaluate, "SAVE_EVERY_PROMPTS", 2)
    recipe = recipe_for(root, tmp_path / "cut", data, stage="evaluate")
    run_evaluation(recipe, "e")
    lines = (tmp_path / "cut" / "evaluation-e.rollouts.jsonl").read_text().splitlines()
    # What the kill of a process leaves: the settings, whole rows of three responses to two prompts, half a line.
    tokens, model = recipe.generation.max_response_tokens, recipe.model.hf_path
    log = Evaluation("e", tmp_path / "cut", recipe.evaluation, recipe.reward, tokens, model, step=0).open_log()
    log.append([json.loads(line) for line in lines[:3]])
    with log.path.open("a") as file:
        file.write(lines[3][:40])
    first = lines[0].replace('"text": "', '"text": "kept ')
    log.path.write_text(log.path.read_text().replace(lines[0], first))
    assert run_evaluation(recipe, "e") == whole
    again = (tmp_path / "cut" / "evaluation-e.rollouts.jsonl").read_text().splitlines()
    assert again[0] == first, "the prompt that was done is not generated again"
    assert again[1:] == (tmp_path / "whole" / "evaluation-e.rollouts.jsonl").read_text().splitlines()[1:]
    assert not log.path.exists()


def test_validation_and_the_command_agree_on_alternative_answers(root: Path, tmp_path: Path) -> None:
    samples = list(read_shards(root / "data", parse_sample, count=6))
    others = [replace(sample, answer="neither", alternatives=("0", "1")) for sample in samples]
    write_shards(others, tmp_path / "data")
    recipe = recipe_for(root, tmp_path / "run", (f"evaluation.data={tmp_path / 'data'}",), stage="evaluate")
    with open_model(recipe) as loaded, loaded.verifiers() as pool:
        evaluator = loaded.evaluator(loaded.engine(), pool, settings=recipe.evaluation, reward=recipe.reward)
        validated = evaluator.run(list(loaded.read_prompts(recipe.evaluation.data)), name="validation", step=0)
    assert validated.pass_at_1 > 0
    commanded = run_evaluation(recipe, "validation")
    assert replace(commanded, model="", data="", available=0) == validated


def test_two_replicas_write_the_same_bytes(root: Path, tmp_path: Path) -> None:
    data = (f"evaluation.data={root / 'data'}", "evaluation.prompts=5")
    one, *_ = run_ranks(1, run_evaluation, recipe_for(root, tmp_path / "one", data, stage="evaluate"), "e")
    results = run_ranks(2, run_evaluation, recipe_for(root, tmp_path / "two", data, stage="evaluate"), "e")
    assert results == [one, None]
    for name in ("evaluation-e.json", "evaluation-e.rollouts.jsonl"):
        ours, theirs = (
            # All but the time at which each ended.
            re.sub(rb'"finished": "[^"]+"', b'"finished": ""', (tmp_path / folder / name).read_bytes())
            for folder in ("two", "one")
        )
        assert ours == theirs


def unanswered_data(folder: Path) -> Path:
    """Write prompts of which the last has no answer, and none has a response or a pair."""
    write_data(folder / "answered", images=4, texts=0)
    answered = read_shards(folder / "answered", parse_sample)
    samples = [replace(sample, response=None, chosen=None, rejected=None) for sample in answered]
    samples[-1] = replace(samples[-1], answer="", answer_type=None)
    write_shards(samples, folder / "data")
    return folder / "data"


def test_a_prompt_without_an_answer_is_refused_before_anything_is_generated(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = unanswered_data(tmp_path)
    monkeypatch.setattr(evaluate, "_respond", lambda *_: pytest.fail("it has begun to generate"))
    for more in ((), ("evaluation.endpoint_url=http://127.0.0.1:9/v1", "evaluation.endpoint_model=served")):
        recipe = recipe_for(root, tmp_path / "run", (f"evaluation.data={data}", *more), stage="evaluate")
        run = run_endpoint_evaluation if more else run_evaluation
        with pytest.raises(ValueError, match="prompt 'sample-003' has no answer, which an evaluation compares"):
            run(recipe, "e")
    training = (f"data.validation={data}", "evaluation.every_steps=1")
    with pytest.raises(ValueError, match="prompt 'sample-003' has no answer, which an evaluation compares"):
        run_stage(recipe_for(root, tmp_path / "align", training, stage="align"))
