"""Evaluation of a served model, end to end over a real socket: scores, judge, interruption, what is left on disk."""

import io
import json
import re
from dataclasses import replace

import pytest
from PIL import Image

from megatron_r1v2.config.recipes import EvaluateRecipe
from megatron_r1v2.config.schema import EvaluationConfig, RewardConfig, RunConfig
from megatron_r1v2.data.samples import ShardSample
from megatron_r1v2.data.shards import write_shards
from megatron_r1v2.evaluation import chat_endpoint
from megatron_r1v2.evaluation.chat_endpoint import EndpointFailed
from megatron_r1v2.evaluation.pass_at_1 import read_evaluation
from megatron_r1v2.stages.endpoint_evaluation import run_endpoint_evaluation
from tests.evaluation.responder import completion, serving


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Keep tests from waiting as long as an evaluation does."""
    short = replace(chat_endpoint.PATIENCE, attempts=1, concurrency=3, timeout_seconds=20.0)
    monkeypatch.setattr(chat_endpoint, "PATIENCE", short)


def picture(color):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(buffer, format="PNG")
    return buffer.getvalue()


def sample(number, **fields):
    return ShardSample(
        key=f"q-{number}",
        messages=({"role": "user", "content": f"<image>\nquestion {number}"},),
        answer=str(number),
        answer_type="numeric",
        images={"0.png": picture((number * 20, 0, 0))},
        metadata={"benchmark": "MMMU", "subject": "even" if number % 2 == 0 else "odd"},
        facts={"left": str(number)},
        **fields,
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards([sample(n) for n in range(1, 5)] + [sample(5, alternatives=("five",))], folder)
    return folder


def recipe(shards, output, url, **evaluation):
    settings = {"runs": 2, **evaluation}
    return EvaluateRecipe(
        run=RunConfig(output_dir=str(output)),
        reward=RewardConfig(claim_pattern=r"(?P<name>left) (?P<value>\d)"),
        evaluation=EvaluationConfig(data=str(shards), endpoint_url=url, endpoint_model="served", **settings),
    )


def port_of(url):
    return int(re.search(r":(\d+)/", url)[1])


def number_of(body):
    text = next(part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text")
    return int(re.search(r"question (\d)", text)[1])


def answer(body):
    """1 is right, 2 contradicts its image, 3 is right in words only, 4 has no box, 5 gives the alternative."""
    texts = {
        1: "left 1</think>\\boxed{1}",
        2: "left 9</think>\\boxed{9}",
        3: "left 3</think>\\boxed{three}",
        4: "I do not know",
        5: "</think>\\boxed{five}",
    }
    return texts[number_of(body)]


def judge(body):
    prompt = body["messages"][0]["content"]
    right = "Student's final answer: three" in prompt and "Reference answer: 3" in prompt
    return f"They are compared.\nVerdict: {'CORRECT' if right else 'INCORRECT'}"


def rows_of(output, name="evaluation"):
    lines = (output / f"evaluation-{name}.rollouts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_rules_alone(shards, tmp_path):
    with serving(answer) as (url, responder):
        result = run_endpoint_evaluation(recipe(shards, tmp_path, url), "evaluation")
    assert result.pass_at_1 == pytest.approx(2 / 5)
    assert result.runs == (0.4, 0.4)
    assert (result.num_prompts, result.mean_response_tokens, result.model) == (5, 7.0, "served")
    assert result.pass_at_1_interval[0] < 0.4 < result.pass_at_1_interval[1]
    assert (result.hallucination_rate, result.claim_coverage) == (pytest.approx(1 / 3), pytest.approx(3 / 5))
    assert replace(read_evaluation(tmp_path / "evaluation-evaluation.json"), finished="") == result
    rows = rows_of(tmp_path)
    assert [(row["prompt_key"], row["sample_index"]) for row in rows] == [
        (f"q-{n}", run) for n in range(1, 6) for run in range(2)
    ]
    assert [row["correct"] for row in rows[::2]] == [True, False, False, False, True]
    assert rows[0]["image_png"]
    assert rows[1]["image_png"] is None
    assert rows[0]["metadata"]["subject"] == "odd"
    assert not list(tmp_path.glob("*unfinished*"))
    body = responder.bodies[0]
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert body["max_tokens"] == 8192
    assert len({body["seed"] for body in responder.bodies}) == 10


def test_the_judge_decides_what_the_rules_cannot_and_is_asked_once(shards, tmp_path):
    with serving(answer) as (url, _), serving(judge) as (judge_url, judged):
        with_judge = recipe(shards, tmp_path, url, judge_url=judge_url, judge_model="judge")
        result = run_endpoint_evaluation(with_judge, "evaluation")
        assert result.pass_at_1 == pytest.approx(3 / 5)
        # 2 and 3 gave an answer that the rules found wrong, twice the same; 4 gave none.
        assert (len(judged.bodies), result.judged, result.judge_unclear) == (2, 4, 0)
        again = run_endpoint_evaluation(with_judge, "again")
        assert len(judged.bodies) == 2
    assert again.pass_at_1 == result.pass_at_1
    rows = rows_of(tmp_path)
    assert rows[4]["judge"] == {"verdict": True, "text": "They are compared.\nVerdict: CORRECT", "model": "judge"}
    assert (rows[4]["correct"], rows[4]["rule_correct"]) == (True, False)
    assert rows[6]["judge"] is None
    assert "left 3" not in judged.bodies[0]["messages"][0]["content"] + judged.bodies[1]["messages"][0]["content"]


def test_a_judge_without_a_verdict_is_counted_not_hidden(shards, tmp_path):
    with serving(answer) as (url, _), serving(lambda body: "Well, who knows.") as (judge_url, _):
        result = run_endpoint_evaluation(
            recipe(shards, tmp_path, url, judge_url=judge_url, judge_model="judge"), "evaluation"
        )
    assert (result.pass_at_1, result.judge_unclear) == (pytest.approx(2 / 5), 4)


def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_bytes(shards, tmp_path):
    with serving(answer) as (url, _):
        whole = run_endpoint_evaluation(recipe(shards, tmp_path / "whole", url), "evaluation")
    asked = []

    def until_the_sixth(body):
        asked.append(body)
        return 503 if len(asked) > 6 else answer(body)

    with serving(until_the_sixth) as (url, _), pytest.raises(EndpointFailed, match="HTTP 503.*the same command"):
        run_endpoint_evaluation(recipe(shards, tmp_path / "cut", url), "evaluation")
    log = tmp_path / "cut" / "evaluation-evaluation.unfinished.jsonl"
    kept = len(log.read_text().splitlines()) - 1
    assert kept == 6
    with log.open("a") as file:
        file.write('{"prompt_key": "q-1", "sam')  # killed while it wrote
    with serving(answer, port=port_of(url)) as (url, responder):
        result = run_endpoint_evaluation(recipe(shards, tmp_path / "cut", url), "evaluation")
        assert len(responder.bodies) == 10 - kept
    assert result == whole
    kept_bytes, whole_bytes = (
        [
            (tmp_path / folder / "evaluation-evaluation.rollouts.jsonl").read_bytes(),
            # The time at which it ended is its own.
            re.sub(rb'"finished": "[^"]+"', b"", (tmp_path / folder / "evaluation-evaluation.json").read_bytes()),
        ]
        for folder in ("cut", "whole")
    )
    assert kept_bytes == whole_bytes


def test_a_number_within_the_tolerance_is_right_before_a_judge_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_endpoint, "PATIENCE", replace(chat_endpoint.PATIENCE, concurrency=1))  # in their order
    write_shards([replace(sample(1, tolerances=(0.1,)), answer_type="math")], tmp_path / "shards")
    replies = [r"\boxed{1.05\text{ m}}", r"\boxed{1.2}"]
    with serving(lambda body: replies.pop(0)) as (url, _), serving(judge) as (judge_url, judged):
        settings = recipe(tmp_path / "shards", tmp_path, url, judge_url=judge_url, judge_model="judge")
        assert run_endpoint_evaluation(settings, "evaluation").runs == (1.0, 0.0)
    (body,) = judged.bodies
    assert "missed by at most 0.1" in body["messages"][0]["content"]
    assert [row["tolerances"] for row in rows_of(tmp_path)] == [[0.1], [0.1]]


def test_the_text_of_an_option_is_compared_as_text_and_told_to_the_judge(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_endpoint, "PATIENCE", replace(chat_endpoint.PATIENCE, concurrency=1))  # in their order
    asked = replace(sample(1, alternatives=("A. thaliana",)), answer="C", answer_type="choice")
    write_shards([asked], tmp_path / "shards")
    replies = ["\\boxed{A}", "\\boxed{A. thaliana}", "\\boxed{c}", "\\boxed{thale cress}"]
    with serving(lambda body: replies.pop(0)) as (url, _), serving(judge) as (judge_url, judged):
        settings = {"judge_url": judge_url, "judge_model": "judge", "runs": 4}
        result = run_endpoint_evaluation(recipe(tmp_path / "shards", tmp_path, url, **settings), "evaluation")
    assert result.runs == (0.0, 1.0, 1.0, 0.0)
    (body,) = judged.bodies
    assert "Reference answer: C or A. thaliana\n" in body["messages"][0]["content"]


def test_a_judge_that_is_down_loses_nothing(shards, tmp_path):
    with serving(answer) as (url, responder), serving(lambda body: 500) as (judge_url, _):
        settings = recipe(shards, tmp_path, url, judge_url=judge_url, judge_model="judge")
        with pytest.raises(EndpointFailed, match=r"evaluation.judge_url=.*no answer"):
            run_endpoint_evaluation(settings, "evaluation")
        assert len(responder.bodies) == 10
        assert not (tmp_path / "evaluation-evaluation.json").exists()
    with serving(answer, port=port_of(url)) as (url, responder), serving(judge) as (judge_url, _):
        settings = recipe(shards, tmp_path, url, judge_url=judge_url, judge_model="judge")
        assert run_endpoint_evaluation(settings, "evaluation").pass_at_1 == pytest.approx(3 / 5)
        assert not responder.bodies


def test_another_temperature_does_not_go_on_with_old_responses(shards, tmp_path):
    with serving(lambda body: 500) as (url, _), pytest.raises(EndpointFailed):
        run_endpoint_evaluation(recipe(shards, tmp_path, url), "evaluation")
    with serving(answer, port=port_of(url)) as (url, _):
        with pytest.raises(ValueError, match=r"evaluation.temperature was 1.0 and is 0.6.*another --name"):
            run_endpoint_evaluation(recipe(shards, tmp_path, url, temperature=0.6), "evaluation")
        more_runs = run_endpoint_evaluation(recipe(shards, tmp_path, url, runs=3), "evaluation")
    assert len(more_runs.runs) == 3


def test_another_server_does_not_go_on_with_the_first_ones_responses(shards, tmp_path):
    with serving(lambda body: 500) as (first, _), pytest.raises(EndpointFailed):
        run_endpoint_evaluation(recipe(shards, tmp_path, first), "evaluation")
    with serving(answer) as (url, _), pytest.raises(ValueError, match=f"evaluation.endpoint_url was '{first}' and is"):
        run_endpoint_evaluation(recipe(shards, tmp_path, url), "evaluation")


def test_a_question_that_is_refused_is_named(shards, tmp_path):
    def refuse(body):
        return 400 if number_of(body) == 3 else answer(body)

    with serving(refuse) as (url, _), pytest.raises(EndpointFailed, match=r"about 'q-3' with HTTP 400"):
        run_endpoint_evaluation(recipe(shards, tmp_path, url), "evaluation")


def test_a_response_that_was_cut_is_wrong_and_says_so(shards, tmp_path):
    with serving(lambda body: completion("\\boxed{1", finish_reason="length")) as (url, _):
        run_endpoint_evaluation(recipe(shards, tmp_path, url, prompts=1), "evaluation")
    assert {(row["finish_reason"], row["correct"]) for row in rows_of(tmp_path)} == {("length", False)}
