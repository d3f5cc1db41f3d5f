"""The results page of made evaluations: as text, and opened in a headless browser where there is one."""

import base64
import dataclasses
import io
import subprocess
import sys

import pytest
from PIL import Image

from megatron_r1v2.evaluation.pass_at_1 import Conditions, evaluate_outcomes, write_evaluation
from megatron_r1v2.evaluation.response_rows import outcome_of
from megatron_r1v2.evaluation.rollout_records import write_rollouts
from megatron_r1v2.report.evaluation_page import write_evaluation_page
from megatron_r1v2.report.evaluation_read import RESPONSES_SHOWN, RUNS_SHOWN, read_evaluations
from tests.report.browser import PHONE, ask_page, needs_browser, widths_on_a_phone
from tests.report.test_page import HOSTILE, Page


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32), (200, 20, 30)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def row(number, run, *, correct, **fields):
    return {
        "step": 0,
        "prompt_key": f"q-{number}",
        "sample_index": run,
        "question": f"What is {number}?",
        "answer": str(number),
        "answer_type": "math",
        "alternatives": [],
        "text": f"I see {number}</think>\\boxed{{{number}}}",
        "rewards": {"answer": float(correct), "format": 1.0},
        "total": float(correct),
        "advantage": 0.0,
        "correct": correct,
        "rule_correct": correct,
        "claims": [],
        "facts": {"left": str(number)},
        "metadata": {"benchmark": "MMMU", "subject": "Art" if number % 2 else "History"},
        "judge": None,
        "finish_reason": "stop",
        "response_tokens": 9,
        "image_png": png() if run == 0 else None,
        **fields,
    }


def rows():
    found = [row(number, run, correct=number != 2) for number in range(1, 5) for run in range(2)]
    found[2] |= {"claims": [["left", "7", False]]}
    found[3] |= {"judge": {"verdict": False, "text": f"No. {HOSTILE}", "model": "judge-1"}}
    return found


def write(folder, rows, name="mmmu", **changes):
    keys = list(dict.fromkeys(row["prompt_key"] for row in rows))
    result = evaluate_outcomes(
        name, keys, [outcome_of(row) for row in rows], Conditions(0.6, 0.95, seed=0, step=0, model="ours-38b")
    )
    path = write_evaluation(folder, dataclasses.replace(result, **changes))
    write_rollouts(path.with_suffix(".rollouts.jsonl"), rows)
    return write_evaluation_page([folder])


def squeezed(text):
    """Return text without spaces, which HTML puts between cells and a parser does not."""
    return "".join(text.split())


def test_the_page_says_what_the_evaluation_found(tmp_path):
    path = write(tmp_path, rows())
    page = Page(path.read_text())
    text = squeezed(page.text)
    assert "ours-38b" in text
    assert squeezed("MMMU validation 73.6 % 75.0 %") in text
    assert squeezed("Reported: the mean of 5 runs, with responses of up to 64k tokens") in text
    assert squeezed("mmmu temperature 0.6, top-p 0.95, seed 0") in text
    assert squeezed("), n = 4") in text
    assert "partial" not in text
    assert squeezed("AIME 2024 78.9 % -") in text
    assert squeezed("Well-formed Claims") in text
    assert squeezed("Art 100.0 %") in text
    assert squeezed("History 50.0 %") in text
    assert squeezed("1 hallucinated, 1 judged, 0 cut, 2 wrong, 6 right") in text
    assert squeezed("judge-1: wrong No. ") in text
    # One picture for both runs of a prompt.
    assert page.elements.count("img") == 4
    assert page.elements.count("script") == 1


def test_parts_of_the_reward_and_the_order_in_which_evaluations_were_made(tmp_path):
    own = {"rewards": {"answer": 1.0, "format": 1.0, "near": 0.25, "near/boxed": 0.5}}
    before = [row(number, run, correct=True, **own) for number in (1, 2) for run in range(2)]
    write(tmp_path, before, "before")
    (tmp_path / "evaluation-before.json").write_text(
        (tmp_path / "evaluation-before.json").read_text().replace('"finished": "2', '"finished": "1')
    )
    text = squeezed(Page(write(tmp_path, before[:2], "after").read_text()).text)
    assert text.count(squeezed("100.0 % near: 25.0 % near/boxed: 50.0 %")) == 2
    assert text.index("beforetemperature") < text.index("aftertemperature")


def test_columns_without_a_figure_are_left_out(tmp_path):
    bare = [row(number, run, correct=True, facts={}) for number in (1, 2) for run in range(2)]
    text = Page(write(tmp_path, bare).read_text()).text
    assert "Claim coverage" not in text
    assert "By the judge" not in text
    text = Page(write(tmp_path, rows(), "judged").read_text()).text
    assert "Claim coverage" in text
    assert "By the judge" in text


def test_a_column_with_one_value_for_all_breaks_nothing_down(tmp_path):
    half = {"metadata": {"level": "easy", "half": "one"}}
    found = [
        row(number, 0, correct=True, **(half if number < 3 else {"metadata": {"level": "easy"}})) for number in range(5)
    ]
    page = write(tmp_path, found).read_text()
    assert ">half<" in page
    assert ">level<" not in page


def test_a_part_of_a_benchmark_is_said_beside_every_figure(tmp_path):
    text = squeezed(Page(write(tmp_path, rows(), available=900).read_text()).text)
    part = squeezed("n = 4 of 900, partial")
    # The paper's table, Pass@1 and size of the results, the heads of the breakdown and of the responses.
    assert text.count(part) >= 5
    assert squeezed(f"mmmu ({part}), by subject") in text


def test_responses_of_every_kind_are_chosen_from_many(tmp_path):
    many = [row(number, 0, correct=number % 50 != 0) for number in range(1, 1001)]
    many[700] |= {"claims": [["left", "x", False]]}
    write(tmp_path, many)
    (evaluation,) = read_evaluations([tmp_path], [])
    shown = evaluation.responses
    assert len(shown) == RESPONSES_SHOWN
    assert sum(not response["correct"] for response in shown) == 20
    assert any(response["prompt_key"] == "q-701" for response in shown)
    assert evaluation.num_responses == 1000


def test_older_and_damaged_files(tmp_path):
    path = write(tmp_path, rows())
    old = [{k: v for k, v in r.items() if k not in ("metadata", "judge", "sample_index", "facts")} for r in rows()]
    write_rollouts(tmp_path / "evaluation-mmmu.rollouts.jsonl", old)
    (tmp_path / "evaluation-broken.json").write_text("{")
    write_evaluation_page([tmp_path])
    text = " ".join(Page(path.read_text()).text.split())
    assert "evaluation-broken.json is not JSON" in text
    assert "mmmu: the responses carry no metadata" in text


def test_nothing_to_show_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"no evaluation-NAME.json .*megatron_r1v2 evaluate first"):
        write_evaluation_page([tmp_path])
    command = [sys.executable, "-m", "megatron_r1v2", "report", "--evaluations", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "does not exist" in done.stderr) == (2, True)


PROBE = """
  const seen = element => element.offsetHeight > 0 && element.offsetWidth > 0;
  const rows = () => [...document.querySelectorAll("article")].filter(seen);
  const colour = image => {
    const canvas = document.createElement("canvas");
    canvas.getContext("2d").drawImage(image, 0, 0);
    return [...canvas.getContext("2d").getImageData(5, 5, 1, 1).data];
  };
  const rows_of = table => [...document.querySelectorAll(`${table} tbody tr`)].filter(seen).map(row => [...row.cells]);
  document.querySelectorAll("summary").forEach(summary => summary.parentElement.open || summary.click());
  const found = {
    rows: rows().length,
    colours: [...document.images].filter(seen).map(colour),
    paper: rows_of("#paper").map(cells => cells.map(cell => cell.innerText.trim())),
    breakdowns: rows_of(".breakdown").map(
      ([name, rate, bar]) => [name.innerText, rate.innerText, bar.firstChild.offsetWidth / bar.offsetWidth]),
    labels: {},
  };
  const labels = () => Object.fromEntries([...document.querySelectorAll(".filters label")].map(
    label => [label.htmlFor.replace("show-", ""), Number(label.querySelector("small").innerText)]));
  found.labels = labels();
  for (const kind of Object.keys(found.labels)) {
    document.querySelector(`label[for=show-${kind}]`).click();
    found[kind] = rows().map(row => row.querySelector("small").innerText.split(",").slice(0, 2).join());
    found[`groups ${kind}`] = [...document.querySelectorAll(".group")].filter(seen).length;
  }
  document.querySelector("label[for=show-judged]").click();
  found.told = rows()[0].closest(".group").innerText;
  document.querySelector("label[for=show-all]").click();
  const box = document.querySelector("#search");
  found.search = seen(box);
  for (const words of ["what is 3", "HISTORY what", "nowhere", ""]) {
    box.value = words;
    box.dispatchEvent(new Event("input"));
    found[`search ${words}`] = rows().length;
    found[`labels ${words}`] = labels();
  }
  return found;
"""


@needs_browser
def test_rows_images_breakdowns_filters_and_search_in_a_browser(tmp_path):
    found = ask_page(write(tmp_path, rows()), PROBE, tmp_path)
    assert found["rows"] == 8
    # One picture for all runs of a prompt.
    assert found["colours"] == [[200, 20, 30, 255]] * 4
    assert ["MMMU validation", "73.6 %", "75.0 % (25.0 to 100.0), n = 4"] in [row[:3] for row in found["paper"]]
    assert len(found["paper"]) == 10
    by_subject = {name: (rate, width) for name, rate, width in found["breakdowns"]}
    assert by_subject["Art"][0] == "100.0 %"
    assert by_subject["History"][0] == "50.0 %"
    assert by_subject["Art"][1] > 1.8 * by_subject["History"][1] > 0.5
    assert found["wrong"] == ["q-2, run 0", "q-2, run 1"]
    assert found["hallucinated"] == ["q-2, run 0"]
    assert found["judged"] == ["q-2, run 1"]
    assert found["right"] == [f"q-{number}, run {run}" for number in (1, 3, 4) for run in (0, 1)]
    assert len(found["all"]) == 8
    assert found["labels"] == {"all": 8, "hallucinated": 1, "judged": 1, "cut": 0, "wrong": 2, "right": 6}
    for kind, count in found["labels"].items():
        assert len(found[kind]) == count
    assert {kind: found[f"groups {kind}"] for kind in ("all", "wrong", "right", "cut")} == {
        "all": 4,
        "wrong": 1,
        "right": 3,
        "cut": 0,
    }
    for shown in ("I see 2", "expected 2", "judge-1: wrong", "No. ", "0 of 2 right"):
        assert shown in found["told"]
    assert found["search"]
    assert [found[f"search {words}"] for words in ("what is 3", "HISTORY what", "nowhere", "")] == [2, 4, 0, 8]
    assert found["labels HISTORY what"] == {"all": 4, "hallucinated": 1, "judged": 1, "cut": 0, "wrong": 2, "right": 2}
    assert found["labels "] == found["labels"]


def two_models(tmp_path):
    """Write evaluations of two models on the same prompts; they differ on one, and one has a prompt of its own."""
    write(tmp_path / "one", rows(), model="one-38b")
    other = [row(number, run, correct=number != 3) for number in range(1, 6) for run in range(2)]
    write(tmp_path / "other", other, model="other-8b")
    return write_evaluation_page([tmp_path / "one", tmp_path / "other"], tmp_path / "both.html")


def test_a_prompt_stands_once_with_the_responses_of_all_models(tmp_path):
    page = Page(two_models(tmp_path).read_text())
    text = " ".join(page.text.split())
    assert text.count("one-38b, mmmu: 2 of 2 right") == 3
    assert text.count("other-8b, mmmu: 2 of 2 right") == 3
    assert text.count("one-38b, mmmu: 0 of 2 right") == text.count("other-8b, mmmu: 0 of 2 right") == 1
    assert page.elements.count("img") == 5
    # q-2 and q-3, which one of the two has right.
    assert "models differ 2" in text


def test_the_runs_of_a_prompt_are_a_few_of_every_kind(tmp_path):
    many = [row(1, run, correct=run != 30) for run in range(40)] + [row(2, run, correct=True) for run in range(40)]
    text = " ".join(Page(write(tmp_path, many).read_text()).text.split())
    assert "39 of 40 right" in text
    assert "40 of 40 right" in text
    (evaluation,) = read_evaluations([tmp_path], [])
    assert len(evaluation.responses) == 2 * RUNS_SHOWN
    assert [r["sample_index"] for r in evaluation.responses if not r["correct"]] == [30]


@needs_browser
def test_models_that_differ_in_a_browser(tmp_path):
    found = ask_page(two_models(tmp_path), PROBE, tmp_path)
    assert found["labels"]["differ"] == found["groups differ"] == 2
    assert {name.split(",")[0] for name in found["differ"]} == {"q-2", "q-3"}


@needs_browser
def test_the_page_fits_a_phone(tmp_path):
    long = [
        row(n, run, correct=True, question="w" * 300, metadata={"subject": "x" * 90}) for n in (1, 2) for run in (0, 1)
    ]
    write(tmp_path / "long", long, name="a-name-of-an-evaluation-that-is-rather-long", model="/runs/" + "m" * 90)
    write(tmp_path / "rows", rows())
    page = write_evaluation_page([tmp_path / "long", tmp_path / "rows"], tmp_path / "both.html")
    window, content = widths_on_a_phone(page, tmp_path)
    assert window == PHONE
    assert content <= window


@needs_browser
@pytest.mark.parametrize("table", ["paper", "results"])
def test_the_score_is_in_sight_on_a_narrow_page(tmp_path, table):
    """Its interval and the model's path go to lines of their own."""
    write(tmp_path, rows(), model="/data/models/" + "m" * 40, available=900)
    page = write_evaluation_page([tmp_path])
    question = f"""
        document.body.style.width = "390px";
        const cell = document.querySelector("#{table} td.score span");
        return [cell.innerText, cell.getBoundingClientRect().right, cell.getClientRects().length];
    """
    rate, right, lines = ask_page(page, question, tmp_path)
    assert (rate, lines) == ("75.0 %", 1)
    assert right < 390


@needs_browser
def test_what_a_model_or_judge_says_runs_no_script(tmp_path):
    hostile = rows()
    hostile[0] |= {"text": HOSTILE, "question": HOSTILE, "metadata": {"benchmark": HOSTILE, HOSTILE: HOSTILE}}
    path = write(tmp_path, hostile, model=HOSTILE)
    probe = """
      // A response that got through as an element would run by this at the latest.
      const forged = document.createElement("script");
      forged.textContent = "document.body.dataset.forged = 1";
      document.body.append(forged);
      return {scripts: document.scripts.length, images: document.querySelectorAll("img[src=x]").length,
              forged: document.body.dataset.forged || null};
    """
    # The page's own, the probe, and the forged one, which the policy does not let run.
    assert ask_page(path, probe, tmp_path) == {"scripts": 3, "images": 0, "forged": None}
    assert Page(path.read_text()).elements.count("script") == 1
