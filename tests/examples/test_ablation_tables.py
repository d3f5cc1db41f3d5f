import json
from pathlib import Path

import pytest

from examples.digits import ablation_tables as tables
from megatron_r1v2.evaluation.pass_at_1 import EvaluationResult, write_evaluation


def make_run(folder: Path, pass_at_1: float, steps: list[dict[str, float]]) -> Path:
    """Write what a finished run leaves, as far as the tables read it."""
    result = EvaluationResult(
        name="heldout",
        pass_at_1=pass_at_1,
        pass_at_1_std=0.0,
        runs=(pass_at_1,),
        format_rate=1.0,
        hallucination_rate=0.25,
        claim_coverage=1.0,
        mean_response_tokens=20.0,
        num_prompts=10,
        temperature=1.0,
        top_p=1.0,
        seed=0,
        step=3,
    )
    write_evaluation(folder, result)
    if steps:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return folder


def step(number: int, tokens: float, validation: float | None = None, fresh: float = 0.5) -> dict[str, float]:
    line = {
        "step": number,
        "rollout/responses": tokens / 10,
        "rollout/tokens": tokens,
        "ssb/fresh_effective_fraction": fresh,
        "ssb/trained_effective_fraction": 0.6,
    }
    return line if validation is None else line | {"validation/pass_at_1": validation}


def test_a_learning_curve_adds_up_what_was_generated_between_validations():
    steps = [step(1, 100), step(2, 100, 0.5), step(3, 300), step(4, 50, 0.7)]
    assert tables.learning_curve(steps, "rollout/tokens") == [(200, 0.5), (550, 0.7)]


@pytest.mark.parametrize(("target", "expected"), [(0.4, 200.0), (0.5, 200.0), (0.6, 400.0), (0.7, 600.0), (0.8, None)])
def test_the_cost_of_a_target_is_linear_between_validations(target, expected):
    cost = tables.cost_to_reach([(200, 0.5), (600, 0.7)], target)
    assert cost == (expected if expected is None else pytest.approx(expected))


def test_a_dip_does_not_take_a_reached_target_back():
    assert tables.cost_to_reach([(1, 0.2), (2, 0.8), (3, 0.1)], 0.8) == pytest.approx(2)


def test_the_value_at_a_cost_is_linear_and_nothing_outside():
    curve = [(200.0, 0.5), (600.0, 0.7)]
    assert tables.value_at(curve, 300) == pytest.approx(0.55)
    assert tables.value_at(curve, 199) is None
    assert tables.value_at(curve, 601) is None


def test_the_rollouts_table_compares_arms_at_the_tokens_of_the_shortest(tmp_path):
    one = make_run(tmp_path / "one", 0.8, [step(1, 100, 0.5), step(2, 100, 0.7), step(3, 100, 0.9, fresh=0.2)])
    other = make_run(tmp_path / "other", 0.6, [step(1, 150, 0.4), step(2, 100, 0.6)])
    before = make_run(tmp_path / "before", 0.5, [{"step": 1, "mpo/pairs_kept": 3}])
    rows = tables.make_table("rollouts", {"before": [before], "one": [one], "other": [other]})
    assert rows["one"][0][tables.EQUAL_TOKENS] == pytest.approx(0.8)  # at 250 tokens
    assert rows["other"][0][tables.EQUAL_TOKENS] == pytest.approx(0.6)
    assert rows["one"][0]["effective, generated, late"] == 0.2
    assert rows["one"][0]["responses to 82%"] == pytest.approx(26)
    assert rows["other"][0]["responses to 82%"] is None
    assert rows["one"][0]["tokens"] == 300
    assert rows["before"] == [{"Pass@1": 0.5, "hallucination": 0.25, "coverage": 1.0}]


def test_cells_show_mean_deviation_and_how_many_runs_have_a_value():
    assert tables.cell([0.5, 0.6, 0.7]) == "60.0 % +- 10.0 %"
    assert tables.cell([0.5]) == "50.0 %"
    assert tables.cell([1000.0, None, 3000.0]) == "2,000 +- 1,414 (2 of 3)"
    assert tables.cell([None, None]) == "- (0 of 2)"


def test_the_files_hold_every_run_and_say_what_is_missing(tmp_path):
    runs = {"before": [make_run(tmp_path / "before", 0.5, [])], "after": []}
    text = tables.write_table(tmp_path, "parts", runs, seeds=2)
    assert (tmp_path / "table-parts.md").read_text() == text
    assert "unfinished: before: 1 of 2; after: 0 of 2" in text
    content = json.loads((tmp_path / "table-parts.json").read_text())
    assert content["rows"]["before"] == [{"Pass@1": 0.5, "hallucination": 0.25, "coverage": 1.0}]
    assert not list(tmp_path.glob("*.part"))
