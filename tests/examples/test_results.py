import dataclasses
import io
import json

import pytest
from rich.console import Console

from examples import results
from megatron_r1v2.evaluation.pass_at_1 import EvaluationResult, write_evaluation


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(0.35, 0.85, []), (0.60, 0.99, []), (0.34, 0.9, ["34.0%"]), (0.61, 0.84, ["61.0%", "84.0%"])],
)
def test_what_is_not_as_promised_is_said(before, after, expected):
    lines = results.remarks(before, after, start=(0.35, 0.60), goal=0.85)
    assert len(lines) == len(expected)
    for line, number in zip(lines, expected, strict=True):
        assert number in line


def test_the_buffer_table_compares_the_first_and_the_last_third(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    fractions = [0.6, 0.6, 0.4, 0.4, 0.1, 0.3]
    lines = [json.dumps({"step": i, "ssb/fresh_effective_fraction": f}) for i, f in enumerate(fractions)]
    metrics.write_text("\n".join(lines) + "\n")
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    console.print(results.buffer_table(metrics))
    row = next(line for line in console.export_text().splitlines() if "fresh" in line)
    assert [cell.strip() for cell in row.split("\u2502")[2:4]] == ["0.6", "0.2"]


def write_rollouts(folder, name, correct):
    """Write two responses to each of some prompts, right or wrong."""
    rows = [{"prompt_key": f"p{place}", "correct": bool(right)} for place, pair in enumerate(correct) for right in pair]
    path = folder / f"evaluation-{name}.rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_gain_is_told_with_its_interval_and_what_that_shows(tmp_path):
    write_rollouts(tmp_path, "before", [(0, 0), (1, 0), (0, 1), (0, 0)] * 10)
    write_rollouts(tmp_path, "after", [(1, 1), (1, 1), (0, 1), (1, 0)] * 10)
    line = results.gain_line(tmp_path, "before", "after")
    assert line.startswith("after against before: +50.0 points of Pass@1, 95 % interval +")
    assert line.endswith("over 40 prompts: more than chance")
    assert results.gain_line(tmp_path, "after", "before").endswith("less than nothing")
    write_rollouts(tmp_path, "same", [(1, 1), (1, 0), (0, 0), (0, 0)] * 10)
    assert "zero is in it" in results.gain_line(tmp_path, "before", "same")


def test_the_results_are_in_the_order_of_time_and_end_with_what_to_look_at(tmp_path):
    run = tmp_path / "grpo"
    run.mkdir()
    fields = dict.fromkeys(EvaluationResult.__dataclass_fields__, 0)
    none = EvaluationResult(
        **{**fields, "runs": (0.5,), "pass_at_1_interval": None, "pass_at_k": {}, "maj_at_k": {}, "rewards": {}}
    )
    for name, pass_at_1, day in (("aligned", 0.5, 1), ("grpo", 0.9, 3), ("mpo", 0.8, 2)):
        path = write_evaluation(run, dataclasses.replace(none, name=name, pass_at_1=pass_at_1))
        written = json.loads(path.read_text()) | {"finished": f"2026-01-0{day}T00:00:00+00:00"}
        path.write_text(json.dumps(written))
        write_rollouts(run, name, [(0, 1)])
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "report.html").write_text("")
    (tmp_path / "stages").mkdir()
    for name, seconds in (("align", 10), ("grpo", 30.4)):
        (tmp_path / "stages" / f"{name}.json").write_text(json.dumps({"seconds": seconds}))
    out = io.StringIO()
    results.show_results(tmp_path, Console(file=out, width=200), start=(0.35, 0.6), goal=0.85)
    text = out.getvalue()
    assert text.index("aligned") < text.index("mpo") < text.index("grpo")
    assert "NOTE" not in text
    assert "time       40 s in all steps (slowest: grpo 30, align 10)" in text
    assert f"report     {run / 'report.html'}" in text
    assert "HF export" not in text, "there is none"
    assert "try next" in text
