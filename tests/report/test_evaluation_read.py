"""Evaluations of run folders: breakdowns, kinds of responses, and which of them are shown."""

import itertools
import json

import pytest

from megatron_r1v2.evaluation.pass_at_1 import Conditions, Outcome, evaluate_outcomes, write_evaluation
from megatron_r1v2.report.evaluation_read import RESPONSES_SHOWN, judge_words, kinds_of, read_evaluations


def row(number, *, correct=True, **fields):
    return {"prompt_key": f"q-{number}", "correct": correct, "claims": [], "finish_reason": "stop", **fields}


def write(folder, name, rows):
    keys = list(dict.fromkeys(row["prompt_key"] for row in rows))
    counts = dict.fromkeys(keys, 0)
    outcomes = []
    for line in rows:
        key = line["prompt_key"]
        outcomes.append(Outcome(key, counts[key], line["correct"], None, well_formed=1.0, tokens=5))
        counts[key] += 1
    result = evaluate_outcomes(name, keys, outcomes, Conditions(1.0, 1.0, seed=0, step=0, model="m"))
    path = write_evaluation(folder, result)
    path.with_suffix(".rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({}, ["right"]),
        ({"correct": False}, ["wrong"]),
        ({"claims": [["left", "3", False]], "finish_reason": "length"}, ["hallucinated", "cut", "right"]),
        ({"claims": [["left", "3", None], [], 7], "judge": {"verdict": True}}, ["judged", "right"]),
        ({"claims": None, "judge": "text"}, ["right"]),
        ({"claims": 5}, ["right"]),
    ],
)
def test_a_response_can_be_of_several_kinds(fields, kinds):
    assert kinds_of(row(1, **fields)) == kinds


def test_the_words_of_the_judge():
    assert judge_words(row(1)) == ""
    assert judge_words(row(1, judge={"verdict": True, "text": "Yes.", "model": "m"})) == "m: right\nYes."
    assert judge_words(row(1, judge={"verdict": False, "text": "No."})) == "judge: wrong\nNo."
    assert judge_words(row(1, judge={"verdict": None, "text": 5})) == "judge: no verdict, counted as wrong\n5"


def test_fields_of_the_metadata_break_the_result_down(tmp_path):
    rows = [
        row(number, correct=number == 1, metadata={"benchmark": "MMMU", "subject": subject})
        for number, subject in ((1, "Art"), (2, "Art"), (3, "History"))
        for _ in range(2)
    ]
    write(tmp_path, "mmmu", rows)
    (evaluation,) = read_evaluations([tmp_path], [])
    assert evaluation.benchmark == "MMMU"
    art, history = (evaluation.groups["subject"][name] for name in ("Art", "History"))
    assert (art.correct, art.responses, art.prompts, art.rate) == (2, 4, {"q-1", "q-2"}, 0.5)
    assert history.rate == 0.0
    assert evaluation.num_responses == 6
    assert evaluation.counts == {"hallucinated": 0, "judged": 0, "cut": 0, "wrong": 4, "right": 2}


def test_a_column_that_names_single_rows_is_no_breakdown(tmp_path):
    write(tmp_path, "e", [row(number, metadata={"id": str(number), "level": "easy"}) for number in range(61)])
    (evaluation,) = read_evaluations([tmp_path], [])
    assert evaluation.groups.keys() == {"level"}


def test_a_field_with_a_value_for_each_prompt_is_no_breakdown(tmp_path):
    rows = [row(number, metadata={"id": f"shape-{number}", "benchmark": f"of {number}"}) for number in (1, 1, 2)]
    keys = [line["prompt_key"] for line in rows]
    assert keys == ["q-1", "q-1", "q-2"]
    write(tmp_path, "e", [*rows, row(2, metadata={"id": "shape-2", "benchmark": "of 2"})])
    (evaluation,) = read_evaluations([tmp_path], [])
    assert evaluation.groups.keys() == {"benchmark"}


def test_two_benchmarks_are_none(tmp_path):
    write(tmp_path, "both", [row(1, metadata={"benchmark": "MMMU"}), row(2, metadata={"benchmark": "AIME 2024"})])
    (evaluation,) = read_evaluations([tmp_path], [])
    assert evaluation.benchmark == ""


def test_rare_kinds_are_shown_among_many_and_each_with_its_picture(tmp_path):
    rows = [row(number // 2, image_png=f"picture {number // 2}" if number % 2 == 0 else None) for number in range(2000)]
    rows[1501] |= {"claims": [["left", "3", False]]}
    rows[7] |= {"finish_reason": "length"}
    write(tmp_path, "many", rows)
    (evaluation,) = read_evaluations([tmp_path], [])
    shown = evaluation.responses
    assert len(shown) == RESPONSES_SHOWN
    assert [r["prompt_key"] for r in shown if "hallucinated" in kinds_of(r)] == ["q-750"]
    assert [r["prompt_key"] for r in shown if "cut" in kinds_of(r)] == ["q-3"]
    assert all(r["image_png"] == f"picture {r['prompt_key'].removeprefix('q-')}" for r in shown)
    numbers = [int(r["prompt_key"].removeprefix("q-")) for r in shown]
    assert numbers == sorted(numbers)
    assert max(b - a for a, b in itertools.pairwise(numbers)) < 20


def test_damage_is_noted_and_nothing_at_all_refused(tmp_path):
    with pytest.raises(ValueError, match=r"run folder '.*none' does not exist"):
        read_evaluations([tmp_path / "none"], [])
    (tmp_path / "evaluation-broken.json").write_text("{")
    notes = []
    with pytest.raises(ValueError, match=r"there is no evaluation-NAME.json in .*; run python -m megatron_r1v2"):
        read_evaluations([tmp_path], notes)
    assert len(notes) == 1
    assert "evaluation-broken.json" in notes[0]
