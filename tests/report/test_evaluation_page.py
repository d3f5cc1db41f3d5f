"""The results page of made evaluations: as text, and opened in a headless browser where there is one."""

import base64
import dataclasses
import io
import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from megatron_r1v2.evaluation.pass_at_1 import Conditions, evaluate_outcomes, write_evaluation
from megatron_r1v2.evaluation.response_rows import outcome_of
from megatron_r1v2.evaluation.rollout_records import write_rollouts
from megatron_r1v2.report.evaluation_page import write_evaluation_page
from megatron_r1v2.report.evaluation_read import RESPONSES_SHOWN, read_evaluations
from tests.report.test_page import HOSTILE, Page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


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
    assert squeezed("), n = 4") in text
    assert "partial" not in text
    assert squeezed("AIME 2024 78.9 % -") in text
    assert squeezed("Art 100.0 %") in text
    assert squeezed("History 50.0 %") in text
    assert squeezed("1 hallucinated, 1 judged, 0 cut, 2 wrong, 6 right") in text
    assert squeezed("judge-1: wrong No. ") in text
    # Each of eight responses has its prompt's picture, also the second of a prompt.
    assert page.elements.count("img") == 8
    assert "script" not in page.elements


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


def in_browser(page, tmp_path):
    """Return the page's document as the browser has it after layout."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


PROBE = """
<script>
addEventListener("load", () => {
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
  };
  for (const kind of ["wrong", "hallucinated", "judged", "right", "all"]) {
    document.querySelector(`label[for=show-${kind}]`).click();
    found[kind] = rows().map(row => row.querySelector("small").innerText.split(",").slice(0, 2).join());
  }
  document.querySelector("label[for=show-judged]").click();
  found.told = rows()[0].innerText;
  document.title = JSON.stringify(found);
});
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")
def test_rows_images_breakdowns_and_filters_in_a_browser(tmp_path):
    path = write(tmp_path, rows())
    # The page itself has no script and its policy allows none: the probe replaces the policy of a copy.
    source = path.read_text().replace("default-src 'none';", "default-src 'unsafe-inline';")
    probed = tmp_path / "probed.html"
    probed.write_text(source.replace("</body>", PROBE + "</body>"))
    document = Page(in_browser(probed, tmp_path))
    found, _ = json.JSONDecoder().raw_decode(document.text[document.text.index("{") :])
    assert found["rows"] == 8
    assert found["colours"] == [[200, 20, 30, 255]] * 8
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
    for shown in ("I see 2", "expected 2", "judge-1: wrong", "No. "):
        assert shown in found["told"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")
def test_what_a_model_or_judge_says_runs_no_script(tmp_path):
    hostile = rows()
    hostile[0] |= {"text": HOSTILE, "question": HOSTILE, "metadata": {"benchmark": HOSTILE, HOSTILE: HOSTILE}}
    path = write(tmp_path, hostile, model=HOSTILE)
    document = in_browser(path, tmp_path)
    assert "<img src=x" not in document.replace("&lt;", "")
    assert Page(document).elements.count("script") == 0
