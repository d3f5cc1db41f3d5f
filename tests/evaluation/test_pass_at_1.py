import dataclasses
import io
import json
import random
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from megatron_r1v2.evaluation.pass_at_1 import (
    Conditions,
    EvaluationResult,
    Outcome,
    check_name,
    comparison_table,
    evaluate_outcomes,
    evaluation_path,
    read_evaluation,
    reward_parts,
    write_evaluation,
)


def _scored(key, run, correct, *, tokens=4, claims=(("left", "3"),), well_formed=True):
    return Outcome(key, run, correct, None, float(well_formed), tokens, claims, {"left": "3"})


def _evaluate(keys, outcomes, name="before"):
    return evaluate_outcomes(name, list(keys), outcomes, Conditions(1.0, 1.0, seed=3, step=7))


def _example():
    prompts = "abcd"
    correct = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]  # by run, then prompt: 0.5, 0.25, 0.75
    scored = [
        _scored(prompt, run, bool(correct[run][index]), tokens=4 + run)
        for run in range(3)
        for index, prompt in enumerate(prompts)
    ]
    scored[0] = dataclasses.replace(scored[0], claims=(("left", "9"), ("left", "3")), well_formed=0.0)
    scored[1] = dataclasses.replace(scored[1], claims=())
    return prompts, scored


def test_pass_at_1_is_the_mean_over_runs_with_its_deviation():
    result = _evaluate(*_example())
    # Right of three: a 3, b 2, c 1, d 0; of two drawn at least one is right in 1, 1, 2/3 and 0 of the cases.
    assert result.pass_at_k["2"][0] == pytest.approx((1 + 1 + 2 / 3 + 0) / 4)
    assert result.pass_at_k["3"][0] == pytest.approx(3 / 4)
    low, high = result.pass_at_1_interval
    assert 0 <= low < 0.5 < high <= 1
    assert result.pass_at_k["3"][1] <= 0.75 <= result.pass_at_k["3"][2]
    bare = dataclasses.replace(result, pass_at_1_interval=None, pass_at_k={}, maj_at_k={})
    assert bare == EvaluationResult(
        name="before",
        pass_at_1=0.5,
        pass_at_1_std=0.25,
        runs=(0.5, 0.25, 0.75),
        format_rate=11 / 12,
        hallucination_rate=1 / 12,
        claim_coverage=11 / 12,
        mean_response_tokens=5.0,
        num_prompts=4,
        temperature=1.0,
        top_p=1.0,
        seed=3,
        step=7,
    )


def test_the_order_of_the_responses_does_not_change_a_bit():
    prompts, scored = _example()
    expected = _evaluate(prompts, scored)
    random.Random(0).shuffle(scored)
    assert _evaluate(prompts[::-1], scored) == expected


def test_one_run_has_no_deviation_and_no_claims_have_no_rate():
    result = _evaluate("a", [_scored("a", 0, True, claims=())])
    assert (result.pass_at_1, result.pass_at_1_std, result.runs) == (1.0, 0.0, (1.0,))
    assert result.hallucination_rate is None
    assert result.claim_coverage == 0.0


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ("", [], "needs prompts and responses, got 0 and 0"),
        ("a", [], "needs prompts and responses, got 1 and 0"),
        ("aa", [("a", 0)], "2 evaluation prompts have only 1 keys"),
        ("a", [("a", 0), ("b", 0)], "answers 'b'"),
        ("a", [("a", 0), ("a", 0)], "'a' has two responses in run 0"),
        ("ab", [("a", 0), ("b", 0), ("a", 1)], r"\['b'\] have no response in run 1 of 2"),
        ("a", [("a", 1)], "no response in run 0 of 2"),
    ],
)
def test_every_prompt_must_be_in_every_run(prompts, responses, message):
    with pytest.raises(ValueError, match=message):
        _evaluate(prompts, [_scored(key, run, True) for key, run in responses])


def test_the_record_has_the_agreed_fields_and_reads_back(tmp_path):
    result = _evaluate(*_example(), name="after")
    path = write_evaluation(tmp_path / "run", result)
    assert path == tmp_path / "run" / "evaluation-after.json"
    found = read_evaluation(path)
    assert dataclasses.replace(found, finished="") == result
    assert datetime.now(UTC) - datetime.fromisoformat(found.finished) < timedelta(hours=1)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert json.loads(path.read_text()).keys() == {
        "name", "pass_at_1", "pass_at_1_std", "runs", "format_rate", "hallucination_rate", "claim_coverage",
        "mean_response_tokens", "num_prompts", "temperature", "top_p", "seed", "step", "pass_at_1_interval",
        "pass_at_k", "maj_at_k", "model", "judged", "judge_unclear", "finished", "data", "available",
        "rewards",
    }  # fmt: skip


def test_a_file_from_before_the_intervals_reads(tmp_path):
    path = write_evaluation(tmp_path, _evaluate(*_example()))
    fields = json.loads(path.read_text())
    newer = ("pass_at_1_interval", "pass_at_k", "maj_at_k", "model", "judged", "judge_unclear", "finished", "data")
    for name in (*newer, "available", "rewards"):
        del fields[name]
    path.write_text(json.dumps(fields))
    old = read_evaluation(path)
    assert (old.pass_at_1, old.pass_at_1_interval, old.pass_at_k) == (0.5, None, {})
    assert old.size == "n = 4"
    table = Console(width=100, record=True, file=io.StringIO())
    table.print(comparison_table([old, dataclasses.replace(_evaluate(*_example()), name="after")]))
    assert "Pass@2" not in table.export_text()


def test_further_parts_of_the_reward_have_means_over_the_responses_that_have_them():
    parts = [{"near": 0.5}, {"near": 1.0, "steps": 0.2}, {}]
    scored = [dataclasses.replace(_scored("a", run, True), rewards=part) for run, part in enumerate(parts)]
    result = _evaluate("a", scored)
    assert result.rewards == {"near": 0.75, "steps": 0.2}
    assert reward_parts([_evaluate(*_example()), result]) == ["near", "steps"]
    table = Console(width=100, record=True, file=io.StringIO())
    without = dataclasses.replace(result, name="old", rewards={})
    table.print(comparison_table([without, result]))
    (line,) = [line for line in table.export_text().splitlines() if "reward: near" in line]
    assert [cell.strip() for cell in line.split("\u2502")[2:4]] == ["-", "75.0 %"]


def _outcomes(answers, correct):
    return [
        Outcome("a", run, is_right, answer, 1.0, 4)
        for run, (answer, is_right) in enumerate(zip(answers, correct, strict=True))
    ]


def test_a_majority_counts_right_answers_as_one_and_wrong_ones_by_their_text():
    def majority(answers, correct):
        result = evaluate_outcomes("x", ["a"], _outcomes(answers, correct), Conditions(1.0, 1.0, seed=0, step=0))
        return result.maj_at_k[str(len(answers))][0]

    assert majority(["1/2", "0.5", "3", "3"], [True, True, False, False]) == 0.5
    assert majority(["1/2", "0.5", "3", "4"], [True, True, False, False]) == 1
    assert majority(["1/2", "3", " 3", None], [True, False, False, False]) == 0
    assert majority(["1/2", None, "", None], [True, False, False, False]) == 1


def test_a_rate_that_does_not_exist_is_null(tmp_path):
    path = write_evaluation(tmp_path, _evaluate("a", [_scored("a", 0, True, claims=())]))
    assert json.loads(path.read_text())["hallucination_rate"] is None
    assert read_evaluation(path).hallucination_rate is None


@pytest.mark.parametrize("content", ["", '{"name": "before"', '{"name": "before"}', "[]", "\xff"])
def test_a_broken_record_is_an_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "evaluation-before.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"evaluation-before.json .*run the evaluation again"):
        read_evaluation(path)


@pytest.mark.parametrize("name", ["", "../before", "a b", "a.b"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="part of a file name"):
        evaluation_path(tmp_path, name)


def test_the_table_shows_before_and_after():
    before = _evaluate(*_example())
    after = _evaluate(
        "abcd",
        [_scored(prompt, run, True, claims=()) for run in range(3) for prompt in "abcd"],
        name="after",
    )
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(comparison_table([before, after]))
    text = console.export_text()
    rows = {line.split("\u2502")[1].strip(): line for line in text.splitlines() if line.startswith("\u2502")}
    assert "50.0 % +- 25.0 %" in rows["Pass@1"]
    assert "100.0 % +- 0.0 %" in rows["Pass@1"]
    assert [cell.strip() for cell in rows["hallucination rate"].split("\u2502")[2:4]] == ["8.3 %", "-"]
    assert "4 x 3" in rows["prompts x runs"]
    assert "partial" not in text


def test_a_part_of_a_benchmark_is_called_one():
    keys, outcomes = _example()
    part = evaluate_outcomes("x", list(keys), outcomes, Conditions(1.0, 1.0, seed=3, step=7, available=900))
    assert part.size == "n = 4 of 900, partial"
    assert dataclasses.replace(part, available=4).size == "n = 4"
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(comparison_table([part]))
    assert "4 x 3, partial" in console.export_text()


def test_a_result_is_not_replaced_by_one_of_something_else(tmp_path):
    conditions = {"model": "m", "step": 7, "data": "/data", "temperature": 1.0}
    check_name(tmp_path, "before", **conditions)
    write_evaluation(tmp_path, dataclasses.replace(_evaluate(*_example()), model="m", data="/data"))
    check_name(tmp_path, "before", **conditions)
    check_name(tmp_path, "after", **conditions | {"model": "n"})
    for name, value in {"model": "n", "step": 8, "data": "/other", "temperature": 0.5}.items():
        with pytest.raises(
            ValueError, match=f"evaluation-before.json is the result of another .*: {name} was .*--name"
        ):
            check_name(tmp_path, "before", **conditions | {name: value})
    # A file that does not say, or cannot be read, stands in nobody's way.
    write_evaluation(tmp_path, dataclasses.replace(_evaluate(*_example()), model="m"))
    check_name(tmp_path, "before", **conditions)
    (tmp_path / "evaluation-before.json").write_text("{")
    check_name(tmp_path, "before", **conditions)
    with pytest.raises(ValueError, match="part of a file name"):
        check_name(tmp_path, "a b")


def test_evaluations_that_cannot_be_compared_are_not():
    before = _evaluate(*_example())
    with pytest.raises(ValueError, match="differ in"):
        comparison_table([before, dataclasses.replace(before, name="after", seed=4)])
