"""The questions to a judge, and the reading of its words."""

import json

import pytest

from megatron_r1v2.evaluation.chat_endpoint import Completion, read_completion
from megatron_r1v2.evaluation.judge import judge_prompt, judge_rows, needs_judge, read_verdict
from tests.evaluation.responder import completion, serving
from tests.evaluation.test_chat_endpoint import endpoint

ROW = {
    "text": "\\boxed{x}", "rule_correct": False, "answer_type": "math", "question": "Q", "answer": "y",
    "alternatives": ["z"], "prompt_key": "q-1", "tolerances": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, True),
        ({"rule_correct": True}, False),
        ({"text": "no box"}, False),
        ({"text": "\\boxed{ }"}, False),
        ({"text": "\\boxed{B}", "answer_type": "choice"}, False),
        ({"text": "\\boxed{(B)}", "answer_type": "choice"}, False),
        ({"text": "\\boxed{the second}", "answer_type": "choice"}, True),
    ],
)
def test_who_is_judged(changes, asked):
    assert needs_judge({**ROW, **changes}) is asked


def test_what_the_judge_is_told_and_says():
    told = judge_prompt({**ROW, "text": "secret reasoning {0}</think>\\boxed{\\frac{1}{2}}"})
    assert "Reference answer: y or z\nStudent's final answer: \\frac{1}{2}" in told
    near = judge_prompt({**ROW, "tolerances": [0.1, 0.05]})
    assert "Reference answer: y or z\nA number of the reference may be missed by at most 0.1 or 0.05" in near
    assert "secret" not in told


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        ("Verdict: CORRECT ... no:\n**Verdict: INCORRECT**", False),
        ("verdict: **correct**", True),
        ("**Verdict:** CORRECT", True),
        ('Verdict: "CORRECT"', True),
        ("Verdict: `INCORRECT`", False),
        ("Verdict: \N{LEFT DOUBLE QUOTATION MARK}CORRECT\N{RIGHT DOUBLE QUOTATION MARK}", True),
        ("It is CORRECT", None),
        ("Verdict: CORRECTED", None),
    ],
)
def test_verdicts_as_judges_write_them(words, verdict):
    assert read_verdict(Completion(words, words, "stop", None)) is verdict


@pytest.mark.parametrize(
    ("message", "verdict"),
    [
        ({"text": "Is it Verdict: INCORRECT?</think>Verdict: CORRECT"}, True),
        ({"text": "I end with Verdict: CORRECT or Verdict: INCORRECT</think>Who knows"}, None),
        ({"text": "Verdict: CORRECT", "finish_reason": "length"}, None),
        ({"text": "Verdict: CORRECT", "reasoning_content": "Verdict: INCORRECT"}, True),
        ({"text": None, "reasoning_content": "Verdict: CORRECT or Verdict: INCORRECT"}, None),
        ({"text": None, "reasoning_content": "Verdict: CORRECT or", "finish_reason": "length"}, None),
    ],
)
def test_reasoning_is_no_verdict(message, verdict):
    assert read_verdict(read_completion(completion(**message))) is verdict


def judged(words, cache):
    """Return the verdict, and how often the judge was asked."""
    with serving(lambda body: words) as (url, responder):
        (row,) = judge_rows([ROW], endpoint(url, kind="judge"), cache, max_tokens=100)
    return row["judge"]["verdict"], len(responder.bodies)


def test_no_verdict_is_asked_for_again(tmp_path):
    cache = tmp_path / "judge.jsonl"
    assert judged("I wonder", cache) == (None, 1)
    assert judged(completion("Verdict: INCORRECT", finish_reason="length"), cache) == (None, 1)
    assert judged("Verdict: CORRECT", cache) == (True, 1)
    assert judged("Verdict: INCORRECT", cache) == (True, 0)


def test_no_verdict_that_an_older_version_kept_is_asked_for_again(tmp_path):
    cache = tmp_path / "judge.jsonl"
    judged("Verdict: CORRECT", cache)
    entry = json.loads(cache.read_text())
    cache.write_text(json.dumps({**entry, "verdict": None}) + "\n")
    assert judged("Verdict: INCORRECT", cache) == (False, 1)


def test_a_damaged_line_is_named(tmp_path):
    cache = tmp_path / "judge.jsonl"
    cache.write_text('{"hash": "x"}\n')
    with pytest.raises(ValueError, match=r"judge.jsonl, line 1 is damaged"):
        judged("Verdict: CORRECT", cache)
