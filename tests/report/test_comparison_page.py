"""The page that compares runs: their settings, figures and curves."""

import json

import pytest

from megatron_r1v2.report.charts import COLORS
from megatron_r1v2.report.comparison_page import differing_settings, run_names, write_comparison
from megatron_r1v2.report.read import read_run
from tests.report.browser import PHONE, needs_browser, widths_on_a_phone
from tests.report.test_page import HOSTILE, Page, write_evaluations, write_lines


def write_run(folder, *, name="grpo", recipe="", loss=1.0, steps=4):
    folder.mkdir(parents=True)
    head = f"run: {{name: {name}, stage: grpo, output_dir: {folder}}}\n"
    (folder / "recipe.yaml").write_text(head + recipe, encoding="utf-8")
    write_lines(folder / "metrics.jsonl", [{"step": s, "actor/loss": loss * s} for s in range(1, steps + 1)])
    return folder


def test_settings_are_listed_where_they_differ(tmp_path):
    one = write_run(tmp_path / "a", recipe="buffer: {capacity: 0, max_age: 20}\ntrain: {steps: 4}\n")
    other = write_run(tmp_path / "b", recipe="buffer: {capacity: 4096}\ntrain: {steps: 4}\n")
    (tmp_path / "c").mkdir()
    runs = [read_run(folder) for folder in (one, other, tmp_path / "c")]
    found = {setting.name: list(setting.values) for setting in differing_settings(runs)}
    assert found == {"buffer.capacity": ["0", "4096", "-"], "buffer.max_age": ["20", "-", "-"]}


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b"), write_run(tmp_path / "c", name="other")]
    assert run_names([read_run(folder) for folder in folders]) == [str(folders[0]), str(folders[1]), "other"]


def test_the_page_shows_runs_settings_and_curves_in_one_colour_each(tmp_path):
    one = write_run(tmp_path / "a", name="plain", recipe="buffer: {capacity: 0}\ntrain: {steps: 4}\n")
    other = write_run(tmp_path / "b", name="buffer", recipe="buffer: {capacity: 9}\ntrain: {steps: 4}\n", loss=2.0)
    write_evaluations(other)
    path = write_comparison([one, other])
    assert path == one / "comparison.html"
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    text = " ".join(page.text.split())
    for expected in (
        "2 runs compared",
        "stagegrpogrpo",
        "last evaluation-after",
        "evaluated with-num prompts 10, runs 5, temperature 1.0, top p 1.0, seed 0",
        "4 of 4",
        "90.0 % (85.9 to 93.9)",
        "buffer.capacity09",
        "Loss",
    ):
        assert expected in text, expected
    assert page.elements.count("svg") == 1
    # A run's colour in the legend, in both tables, and in its curve.
    for color in COLORS[:2]:
        assert source.count(f"border-top-color: {color}") == 3
        assert f"stroke: {color}" in source
    assert not {"script", "link", "iframe"} & set(page.elements)


def test_changed_settings_and_targets_are_in_the_page(tmp_path):
    one = write_run(tmp_path / "a", name="plain", recipe="hallucination: {target_rate: 0.1}\n")
    other = write_run(tmp_path / "b", name="other")
    plain = " ".join(Page(write_comparison([other, one / ".." / "a"]).read_text(encoding="utf-8")).text.split())
    assert "dotted vertical line" not in plain
    assert "dashed horizontal line: target" in plain
    changed = {"step": 2, "settings_changed": [f"generation.temperature: {HOSTILE} -> 0.7"]}
    write_lines(other / "metrics.jsonl", [{"step": s, "actor/loss": 2.0 * s} for s in range(1, 5)] + [changed])
    source = write_comparison([one, other]).read_text(encoding="utf-8")
    text = " ".join(Page(source).text.split())
    assert "dotted vertical line: settings changed" in text
    assert "After step 2 other went on with other settings (dotted line of its colour in the charts): gene" in text
    assert "stroke-dasharray: 1,2" in source
    assert "script" not in Page(source).elements


def test_hostile_names_and_settings_stay_text(tmp_path):
    recipe = f"data: {{train: {json.dumps(HOSTILE[:60])}}}\n"
    one = write_run(tmp_path / "a", name=json.dumps(HOSTILE[:60]), recipe=recipe)
    other = write_run(tmp_path / "b")
    page = Page(write_comparison([one, other], tmp_path / "page.html").read_text(encoding="utf-8"))
    assert not {"script", "img"} & set(page.elements)
    assert "<script>alert(1)" in page.text


def test_a_missing_run_and_one_given_twice_are_refused(tmp_path):
    one = write_run(tmp_path / "a")
    with pytest.raises(ValueError, match=r"run folder '.*none' does not exist"):
        write_comparison([one, tmp_path / "none"])
    with pytest.raises(ValueError, match=r"is given twice; give each run once"):
        write_comparison([one, tmp_path / "b" / ".." / "a"])


@needs_browser
def test_the_page_fits_a_phone(tmp_path):
    folders = [
        write_run(tmp_path / (name * 30), name=name * 60, recipe=f"data: {{train: {name * 90}}}\n") for name in "abc"
    ]
    window, content = widths_on_a_phone(write_comparison(folders, tmp_path / "page.html"), tmp_path)
    assert window == PHONE
    assert content <= window
