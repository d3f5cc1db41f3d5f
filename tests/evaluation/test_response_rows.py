"""Rows of responses: what is right besides the answer, which rows count, and what is left on disk."""

import json
from dataclasses import replace

import pytest
import torch

from megatron_r1v2.config.schema import EvaluationConfig, RewardConfig
from megatron_r1v2.evaluation.pass_at_1 import EVALUATION_SEED
from megatron_r1v2.evaluation.response_rows import Evaluation, evaluation_rows, outcome_of
from megatron_r1v2.types import Prompt, Rollout, ScoredRollout
from tests.evaluation.responder import serving

TILES = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)


def prompt(key="q-1", **fields):
    settings = {"answer": "8", "answer_type": "math", "facts": {"left": "3"}} | fields
    return Prompt(key, ({"role": "user", "content": "<image>\nHow many?"},), (1,), TILES, **settings)


def scored(text, index=0, *, key="q-1", correct=False, claims=()):
    rollout = Rollout(key, index, (5, 6), (0.0, 0.0), policy_version=0, finish_reason="stop")
    return ScoredRollout(rollout, text, {"answer": float(correct), "format": 1.0}, 1.0, correct, claims)


def rows_of(asked, *texts, **fields):
    responses = [scored(text, index) for index, text in enumerate(texts)]
    return evaluation_rows([asked], responses, step=3, **fields)


def test_a_row_says_all_that_its_verdict_depends_on():
    asked = prompt(alternatives=("eight",), tolerances=(0.5,), metadata={"subject": "Art"})
    responses = [scored("\\boxed{8}", 0, correct=True), scored("I do not know", 1)]
    first, second = evaluation_rows([asked], responses, step=3)
    assert (first["step"], first["prompt_key"], first["sample_index"], second["sample_index"]) == (3, "q-1", 0, 1)
    assert (first["answer"], first["answer_type"], first["alternatives"]) == ("8", "math", ["eight"])
    assert (first["tolerances"], first["facts"], first["metadata"]) == ([0.5], {"left": "3"}, {"subject": "Art"})
    assert [(row["correct"], row["rule_correct"], row["judge"]) for row in (first, second)] == [
        (True, True, None), (False, False, None),
    ]  # fmt: skip
    assert first["image_png"]
    assert second["image_png"] is None, "once a prompt"
    assert json.loads(json.dumps(first)) == first
    assert rows_of(asked, "a", pictures=False)[0]["image_png"] is None


def test_an_outcome_is_what_counts_of_a_row():
    (row,) = evaluation_rows([prompt()], [scored("x</think>\\boxed{9}", claims=(("left", "4"),))], step=0)
    outcome = outcome_of(row)
    assert (outcome.prompt_key, outcome.sample_index, outcome.correct, outcome.answer) == ("q-1", 0, False, "9")
    assert (outcome.well_formed, outcome.tokens) == (1.0, 2)
    assert (outcome.claims, outcome.facts) == ((("left", "4"),), {"left": "3"})
    assert (outcome.judged, outcome.unclear, outcome.rewards) == (False, False, {})
    own = outcome_of({**row, "rewards": {**row["rewards"], "near": 0.5, "near/boxed": 1.0}})
    assert own.rewards == {"near": 0.5, "near/boxed": 1.0}
    for verdict, unclear in ((True, False), (None, True)):
        judged = outcome_of({**row, "judge": {"verdict": verdict, "text": "", "model": "j"}})
        assert (judged.judged, judged.unclear) == (True, unclear)


def evaluation(tmp_path, *, model="m", step=0, **changes):
    settings = EvaluationConfig(**({"data": str(tmp_path / "data"), "runs": 2} | changes))
    return Evaluation("a", tmp_path, settings, RewardConfig(), 64, model, step)


def test_rows_beyond_the_prompts_and_runs_that_are_asked_for_do_not_count(tmp_path):
    asked = [prompt("q-2"), prompt("q-1"), prompt("q-3")]
    responses = [
        scored("\\boxed{8}", index, key=one.key, correct=one.key == "q-1") for one in asked for index in range(3)
    ]
    settings = evaluation(tmp_path, step=5)
    log = settings.open_log()
    log.append(evaluation_rows(asked, responses, step=5))
    result = settings.conclude(["q-2", "q-1"], log)
    assert (result.pass_at_1, result.num_prompts, len(result.runs)) == (0.5, 2, 2)
    assert (result.model, result.step, result.seed) == ("m", 5, EVALUATION_SEED)
    lines = [json.loads(line) for line in (tmp_path / "evaluation-a.rollouts.jsonl").read_text().splitlines()]
    assert [(line["prompt_key"], line["sample_index"]) for line in lines] == [
        ("q-2", 0), ("q-2", 1), ("q-1", 0), ("q-1", 1),
    ]  # fmt: skip
    assert json.loads((tmp_path / "evaluation-a.json").read_text())["pass_at_1"] == 0.5
    assert not (tmp_path / "evaluation-a.unfinished.jsonl").exists()


def test_the_judge_decides_before_the_result_is_written(tmp_path):
    asked = prompt("q-1", answer="three", answer_type="exact")
    with serving(lambda body: "Verdict: CORRECT") as (url, responder):
        settings = evaluation(tmp_path, judge_url=url, judge_model="j", runs=1)
        log = settings.open_log()
        log.append(evaluation_rows([asked], [scored("\\boxed{3}")], step=0))
        result = settings.conclude(["q-1"], log)
    assert (result.pass_at_1, result.judged, len(responder.bodies)) == (1.0, 1, 1)
    assert (tmp_path / "judge.jsonl").is_file()


def test_a_log_belongs_to_all_settings_that_decide_its_rows(tmp_path):
    evaluation(tmp_path).open_log()
    evaluation(tmp_path, runs=9).open_log()  # more runs of the same
    endpoint = {"endpoint_url": "http://127.0.0.1:1", "endpoint_model": "m"}
    for changes in ({"temperature": 0.1}, {"top_p": 0.5}, {"data": "other"}, endpoint):
        with pytest.raises(ValueError, match=f"evaluation.{next(iter(changes))} was"):
            evaluation(tmp_path, **changes).open_log()
    own = tmp_path / "reward.py"
    own.write_text("def f(**_): return 1")
    first = evaluation(tmp_path)
    reward = first.reward.changed(functions=[{"path": str(own), "name": "f"}])
    with pytest.raises(ValueError, match="reward.functions was"):
        replace(first, reward=reward).open_log()
    replace(first, name="b", reward=reward).open_log()
    own.write_text("def f(**_): return 0")
    with pytest.raises(ValueError, match="reward.functions was"):
        replace(first, name="b", reward=reward).open_log()
    for model, step in (("n", 0), ("m", 1)):
        with pytest.raises(ValueError, match="(model|step) was"):
            evaluation(tmp_path, model=model, step=step).open_log()
