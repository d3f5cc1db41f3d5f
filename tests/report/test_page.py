"""The report of made-up runs: complete, half-written, empty, hostile, and long."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from megatron_r1v2.monitoring.metrics import SECTIONS
from megatron_r1v2.report.page import write_report
from megatron_r1v2.report.read import PAIRS_SHOWN, ROLLOUTS_PER_STEP, STEPS_SHOWN, read_run
from megatron_r1v2.rewards.parts import PARTS
from tests.report.browser import PHONE, ask_page, needs_browser, widths_on_a_phone

HOSTILE = "</span></script><script>alert(1)</script><img src=x onerror=alert(2)>\" ' {{ 7*7 }} \ud800 \x00"


def png(width=64, height=32):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (10, 20, 30)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def rollout(step=1, key="digits-0", correct=True, **other):
    return {
        "step": step,
        "prompt_key": key,
        "question": "What is left + right?",
        "answer": "8",
        "text": "left 3, right 5, 3+5=8</think>\\boxed{8}",
        "rewards": {"answer": 1.0, "format": 0.5},
        "total": 1.1,
        "advantage": -0.25,
        "correct": correct,
        "claims": [["left", "3", True], ["right", "6", False], ["top", "1", None]],
        "finish_reason": "stop",
        "response_tokens": 12,
        "image_png": png(),
        **other,
    }


def write_lines(path, rows, end=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end, encoding="utf-8")


class Page(HTMLParser):
    """Elements, attributes and visible text of a page."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.attributes, self.text = [], [], ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def read_page(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    assert not list(run_dir.glob(".report*")), "the temporary file is left behind"
    return Page(path.read_text(encoding="utf-8"))


def all_metric_names():
    metrics = [metric for section in SECTIONS for chart in section.charts for metric in chart.metrics]
    return [name.replace("*", "a_part") for metric in metrics for name in metric.names]


def write_evaluations(tmp_path):
    for name, rate, right in (("before", 0.5, 3), ("after", 0.9, 8)):
        evaluation = {"name": name, "pass_at_1": rate, "runs": [rate] * 5, "format_rate": 0.97}
        evaluation |= {"pass_at_1_interval": [rate - 0.041, rate + 0.039]}
        evaluation |= {"hallucination_rate": 1 - rate, "claim_coverage": 0.99, "mean_response_tokens": 24.0}
        evaluation |= {"num_prompts": 10, "temperature": 1.0, "top_p": 1.0, "seed": 0, "step": 0, "available": 12}
        (tmp_path / f"evaluation-{name}.json").write_text(json.dumps(evaluation), encoding="utf-8")
        lines = [rollout(0, f"digits-{i}", i < right) for i in range(10)]
        write_lines(tmp_path / f"evaluation-{name}.rollouts.jsonl", lines)


def test_parts_of_the_reward_in_the_table_of_evaluations(tmp_path):
    write_evaluations(tmp_path)
    path = tmp_path / "evaluation-after.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rewards": {"near": 0.625, "<near>/boxed": 0.5}}))
    text = "".join(read_page(tmp_path).text.split())
    assert "Reward:near-62.5%" in text
    assert "Reward:<near>/boxed-50.0%" in text


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    rows = [{"step": s, **dict.fromkeys(all_metric_names(), 0.5 + s / 100)} for s in range(1, 41)]
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(folder / "rollouts.jsonl", [rollout(s, f"p{i}", i % 2 == 0) for s in range(1, 41) for i in range(8)])
    write_evaluations(folder)
    (folder / "recipe.yaml").write_text(
        "run: {name: my run, stage: grpo}\ntrain: {steps: 40}\nmodel: {checkpoint: runs/start}\n", encoding="utf-8"
    )
    start = {"time": "2026-11-28T10:00:00+00:00", "version": "0.1.0", "commit": "abc1234", "host": "node7"}
    write_lines(folder / "starts.jsonl", [start | {"processes": 8, "device": "NVIDIA H100"}] * 2)
    return folder


@pytest.fixture(scope="module")
def full_page(full_run):
    return read_page(full_run)


def test_a_finished_run_shows_everything(full_page):
    page = full_page
    for section in SECTIONS:
        for chart in section.charts:
            assert chart.title in page.text
            assert f"{chart.caption} {' '.join(metric.name for metric in chart.metrics)}" in " ".join(page.text.split())
    assert page.elements.count("svg") == sum(len(section.charts) for section in SECTIONS)
    assert page.elements.count("img") == PAIRS_SHOWN + STEPS_SHOWN * ROLLOUTS_PER_STEP
    text = " ".join(page.text.split())
    for expected in (
        "my run",
        "step 40 of 40",
        "50.0 % (45.9 to 53.9)",
        "90.0 % (85.9 to 93.9)",
        "50.0 % \N{RIGHTWARDS ARROW} 90.0 %",
        "before and after; 95 % interval of the last 85.9 to 93.9; n = 10 of 12, partial",
        "stage grpo",
        "model runs/start",
        "version 0.1.0 abc1234",
        "hardware 8 x NVIDIA H100 (node7)",
        "starts 2",
        "began 2026-11-28 10:00:00 UTC",
        "+40.0 points",
        "-40.0 points",
        "5 turned right, 0 turned wrong, 2 stayed wrong, 3 stayed right.",
        "left 3 \N{CHECK MARK}",
        "right 6 \N{BALLOT X}",
        "top 1 ?",
        "answer 1.00",
        "advantage -0.25",
        "\\boxed{8}",
    ):
        assert expected in text, expected
    # On the cards of Pass@1 and of hallucination, and above both columns of the table.
    assert text.count("n = 10 of 12, partial") == 4


def test_a_change_within_the_intervals_is_said_and_not_praised(tmp_path):
    write_evaluations(tmp_path)
    assert '<td class="good">+40.0 points</td>' in write_report(tmp_path).read_text()
    path = tmp_path / "evaluation-after.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pass_at_1_interval": [0.539, 0.95]}))
    assert '<td class="">+40.0 points, the intervals overlap</td>' in write_report(tmp_path).read_text()


def test_the_page_needs_nothing_from_outside(full_run, full_page):
    assert not {"script", "link", "iframe", "object"} & set(full_page.elements)
    for name, value in full_page.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith(("#", "data:image/")), (name, value)
    source = (full_run / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"'\s<>]+", source)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "url(http" not in source


def test_hostile_text_stays_text(tmp_path):
    row = rollout(question=HOSTILE, text=HOSTILE, prompt_key=HOSTILE, answer=HOSTILE, finish_reason=HOSTILE)
    row |= {"claims": [[HOSTILE, HOSTILE, True]], "rewards": {HOSTILE: 1.0}, "image_png": HOSTILE, "correct": HOSTILE}
    write_lines(tmp_path / "rollouts.jsonl", [row])
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, f"reward/{HOSTILE}/mean": 1.0, "reward/$x^$/mean": 2.0}])
    for name in ("before", "after"):
        write_lines(tmp_path / f"evaluation-{name}.rollouts.jsonl", [row])
        (tmp_path / f"evaluation-{name}.json").write_text(
            json.dumps({"name": name, "pass_at_1": HOSTILE, "seed": HOSTILE, "step": HOSTILE}), encoding="utf-8"
        )
    (tmp_path / "recipe.yaml").write_text(f"run: {{name: {json.dumps(HOSTILE)}}}\n# {HOSTILE[:40]}", encoding="utf-8")
    page = read_page(tmp_path)
    assert "script" not in page.elements
    assert "img" not in page.elements
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text


def test_a_run_that_is_still_going_is_shown_so_far(tmp_path):
    rows = [{"step": 1, "actor/loss": 0.5}, {"step": 2, "actor/loss": float("nan")}, {"step": 3, "actor/loss": 0.25}]
    write_lines(tmp_path / "metrics.jsonl", rows, end='{"step": 4, "actor/lo')
    write_lines(tmp_path / "rollouts.jsonl", [rollout()], end='{"step": 4')
    page = read_page(tmp_path)
    assert page.elements.count("svg") == 1
    assert "step 3" in page.text
    assert "damaged" not in page.text


def test_charts_of_zeros_are_one_line_of_text(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": s, "verifier/crashes": 0, "timing_s/step": 1} for s in (1, 2)])
    page = read_page(tmp_path)
    assert "Zero throughout: Trouble." in page.text
    assert page.elements.count("svg") == 1


def test_settings_that_changed_are_a_line_in_each_chart_and_a_note(tmp_path):
    rows = [{"step": s, "actor/loss": 1.0 + s, "timing_s/step": 2} for s in range(1, 5)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    plain = write_report(tmp_path).read_text(encoding="utf-8")
    rows.insert(2, {"step": 2, "settings_changed": ["generation.temperature: 1.0 -> 0.7", f"run.x: {HOSTILE}"]})
    write_lines(tmp_path / "metrics.jsonl", rows)
    changed = write_report(tmp_path).read_text(encoding="utf-8")
    assert (plain.count("#b8892b"), changed.count("#b8892b")) == (0, 2)
    text = " ".join(Page(changed).text.split())
    assert "After step 2 the run went on with other settings" in text
    assert "generation.temperature: 1.0 -> 0.7; run.x: " in text
    assert "script" not in Page(changed).elements


def test_damaged_lines_in_the_middle_are_reported(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "actor/loss": 1}\n\xff\xfe{\n[1]\n\n{"step": 2, "actor/loss": 2}\n'
    )
    assert "metrics.jsonl: 2 damaged lines were left out." in read_page(tmp_path).text
    assert list(read_run(tmp_path).metrics) == [1, 2]


def test_every_part_of_the_reward_is_a_curve_and_a_figure(tmp_path):
    parts = {name: index / 10 for index, name in enumerate(PARTS)}
    metrics = {f"reward/{name}/mean": value for name, value in parts.items()}
    lines = [{"step": s, **metrics, "critic/rewards/mean": 0.5, "reward_model/score/mean": -2.0} for s in (1, 2)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    write_lines(tmp_path / "rollouts.jsonl", [rollout(rewards=parts, model_score=-7.25), rollout(2, model_score=None)])
    text = " ".join(read_page(tmp_path).text.split())
    legend = text[text.index("Reward and correctness") : text.index("Mean total reward")]
    for name, value in parts.items():
        assert name in legend
        assert f"{name} {value:.2f}" in text
    assert text.count("model score -7.25") == text.count("model score") == 1
    assert "reward_model/score/mean" in text


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path):
    assert "There is no metrics.jsonl yet" in read_page(tmp_path).text


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="run folder '.*nowhere' does not exist"):
        write_report(tmp_path / "nowhere")


def test_steps_repeated_after_a_restart_count_once(tmp_path):
    rows = [{"step": s, "actor/loss": float(s)} for s in (1, 2, 3)] + [{"step": 2, "actor/loss": 20.0}]
    write_lines(tmp_path / "metrics.jsonl", rows)
    assert read_run(tmp_path).series("actor/loss") == ([1, 2, 3], [1.0, 20.0, 3.0])
    write_lines(tmp_path / "rollouts.jsonl", [rollout(2), rollout(2)])
    assert len(read_run(tmp_path).rollouts[2]) == 1


def test_wrong_and_right_responses_are_both_shown(tmp_path):
    write_lines(tmp_path / "rollouts.jsonl", [rollout(1, f"p{i}", correct=i != 5) for i in range(8)])
    shown = read_run(tmp_path).rollouts[1]
    assert [row["correct"] for row in shown] == [True, True, True, False]


def test_conditions_that_differ_are_called_out(tmp_path):
    write_evaluations(tmp_path)
    path = tmp_path / "evaluation-after.json"
    evaluation = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(evaluation | {"seed": 7}), encoding="utf-8")
    text = read_page(tmp_path).text
    assert "not measured under the same conditions" in text
    assert text.count("differs") == 1


def test_evaluations_of_two_data_sets_are_compared_only_when_asked_for(tmp_path):
    write_evaluations(tmp_path)
    for name in ("before", "after"):
        path = tmp_path / f"evaluation-{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": f"/data/{name}/test"}), encoding="utf-8")
    assert "not measured under the same conditions" not in read_page(tmp_path).text, "the prompts are the same"
    for name in ("before", "after"):
        (tmp_path / f"evaluation-{name}.rollouts.jsonl").unlink()
    text = " ".join(read_page(tmp_path).text.split())
    assert "before and after" not in text
    assert "points" not in text
    write_report(tmp_path, ("before", "after"))
    text = " ".join(Page((tmp_path / "report.html").read_text(encoding="utf-8")).text.split())
    assert "Databefore/testafter/testdiffers" in text
    assert "not measured under the same conditions" in text


def test_the_date_of_an_evaluation_stands_above_its_figures(tmp_path):
    write_evaluations(tmp_path)
    path = tmp_path / "evaluation-after.json"
    evaluation = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(evaluation | {"finished": "2031-11-28T10:00:00+00:00"}), encoding="utf-8")
    page = read_page(tmp_path)
    assert "2031-11-28" in page.text
    assert "T10:00" not in page.text


def test_a_mixture_is_told_with_its_weights(tmp_path):
    mixture = [{"path": "data/one", "weight": 2}, {"path": "data/other", "weight": 0.5}]
    (tmp_path / "recipe.yaml").write_text(json.dumps({"data": {"train": mixture}}), encoding="utf-8")
    assert "data data/one x 2, data/other x 0.5" in " ".join(read_page(tmp_path).text.split())


def test_a_long_run_with_photographs_stays_small(tmp_path):
    noise = Image.effect_noise((1400, 900), 90).convert("RGB")
    buffer = io.BytesIO()
    noise.save(buffer, format="PNG")
    photograph = base64.b64encode(buffer.getvalue()).decode("ascii")
    rows = [rollout(s, f"p{i}", image_png=photograph, text="x" * 60_000) for s in range(1, 5) for i in range(3)]
    write_lines(tmp_path / "rollouts.jsonl", rows)
    with (tmp_path / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for s in range(20_000):
            file.write(json.dumps({"step": s, "actor/loss": s % 17, "critic/rewards/mean": s % 5}) + "\n")
    page = read_page(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    assert "40000 characters left out" in page.text
    assert page.elements.count("img") == 12


@pytest.mark.parametrize("image", [None, 7, "", "!", "AAAA", base64.b64encode(b"GIF89a").decode(), png()[:-30]])
def test_an_unreadable_image_is_left_out(tmp_path, image):
    write_lines(tmp_path / "rollouts.jsonl", [rollout(image_png=image)])
    assert "img" not in read_page(tmp_path).elements


@pytest.mark.parametrize("row", [{"step": 1}, {"step": 1, "claims": 5, "rewards": [1], "text": None, "total": "x"}])
def test_rollouts_with_missing_fields_are_shown(tmp_path, row):
    write_lines(tmp_path / "rollouts.jsonl", [row])
    assert "Step 1" in read_page(tmp_path).text


def test_a_response_without_a_reference_is_neither_right_nor_wrong(tmp_path):
    own = {"answer": "", "correct": False, "rewards": {"near": 0.75, "near/shown": 1.0}}
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "reward/near/mean": 0.75, "reward/near/shown/mean": 1.0}])
    write_lines(tmp_path / "rollouts.jsonl", [rollout(**own)])
    text = " ".join(read_page(tmp_path).text.split())
    assert "no reference answer" in text
    assert "near 0.75near/shown 1.00" in text
    assert "wrong left 3" not in text
    assert "near/shown" in text.partition("Reward and correctness")[2].partition("Responses")[0]


def test_a_long_question_and_further_turns_are_shown_on_request(tmp_path):
    turns = [{"role": "system", "content": f"Think. {HOSTILE}"}, {"role": "user", "content": "<image>\nAdd them."}]
    rows = [rollout(question="w " * 1000), rollout(messages=turns, prompt_key="with-system"), rollout(prompt_key="p")]
    write_lines(tmp_path / "rollouts.jsonl", rows)
    page = read_page(tmp_path)
    text = " ".join(page.text.split())
    assert text.count("the whole prompt") == 2
    assert f"{'w ' * 300}..." in text
    assert "w " * 999 in text
    assert "system: Think. </span></script>" in text
    assert "user: <image> Add them." in text
    assert "script" not in page.elements


@needs_browser
def test_a_picture_grows_when_it_is_clicked(tmp_path):
    write_lines(tmp_path / "rollouts.jsonl", [rollout(image_png=png(400, 300))])
    found = ask_page(
        write_report(tmp_path),
        """
        const image = document.querySelector(".zoom img"), before = image.offsetWidth;
        image.click();
        return [before, image.offsetWidth, image.naturalWidth];
        """,
        tmp_path,
    )
    assert found[0] <= 322
    assert found[1:] == [400, 400]


@needs_browser
def test_the_report_fits_a_phone(full_run, tmp_path):
    window, content = widths_on_a_phone(write_report(full_run), tmp_path)
    assert window == PHONE
    assert content <= window
    (tmp_path / "run").mkdir()
    row = rollout(question="w" * 900, text="x" * 900, prompt_key="k" * 200, rewards={"r" * 80: 1.0})
    write_lines(tmp_path / "run" / "rollouts.jsonl", [row | {"image_png": png(400, 300)}])
    (tmp_path / "run" / "recipe.yaml").write_text(f"run: {{name: {'n' * 200}}}\nmodel: {{checkpoint: /{'m' * 150}}}\n")
    window, content = widths_on_a_phone(write_report(tmp_path / "run"), tmp_path)
    assert content <= window


@needs_browser
def test_the_bars_of_a_step_are_as_high_as_the_step(tmp_path):
    rows = [{"step": s, "timing_s/generate": 2.0, "timing_s/update": 1.0, "timing_s/step": 4.0} for s in range(1, 9)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    found = ask_page(
        write_report(tmp_path),
        """
        const areas = [...document.querySelectorAll("figure svg [id^=FillBetween]")].map(e => e.getBBox());
        return areas.map(box => [box.y, box.height]);
        """,
        tmp_path,
    )
    generate, update, other = found
    # Stacked from below: each ends where the next begins, and heights are as the seconds.
    assert update[0] + update[1] == pytest.approx(generate[0], abs=0.1)
    assert other[0] + other[1] == pytest.approx(update[0], abs=0.1)
    assert generate[1] == pytest.approx(2 * update[1], rel=0.01)
    assert other[1] == pytest.approx(update[1], rel=0.01)
