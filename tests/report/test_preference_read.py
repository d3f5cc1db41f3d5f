"""Pairs of made shards: which are shown, from which folder, and with what beside them."""

import io
import json

from PIL import Image

from megatron_r1v2.data.samples import ShardSample
from megatron_r1v2.data.shards import write_shards
from megatron_r1v2.report.page import write_report
from megatron_r1v2.report.preference_read import PAIRS_SHOWN, read_preferences
from megatron_r1v2.report.read import read_run
from tests.report.test_page import HOSTILE, Page


def sample(number, *, source="correctness", margin=1.0, **fields):
    stream = io.BytesIO()
    Image.new("RGB", (64, 32), (200, 20, 30)).save(stream, format="PNG")
    return ShardSample(
        key=f"q-{number:03d}-pair0",
        messages=({"role": "user", "content": f"<image>\nWhat is {number}?"},),
        answer=str(number),
        answer_type="numeric",
        images={"0.png": stream.getvalue()},
        source=source,
        margin=margin,
        **{"chosen": f"good {number}</think>\\boxed{{1}}", "rejected": f"bad {number}</think>\\boxed{{2}}", **fields},
    )


def write_pairs(folder):
    samples = [sample(number, margin=number / 100) for number in range(20)]
    samples += [sample(number, source="dropout_ntp") for number in range(20, 22)]
    samples.append(sample(30, chosen=None, rejected=None, response="only supervised"))
    write_shards(samples, folder)
    (folder / "pairs.json").write_text(json.dumps({"pairs": {"correctness": 20, "dropout_ntp": 2}}))
    return folder


def write_run(folder, train, stage="mpo"):
    folder.mkdir()
    (folder / "recipe.yaml").write_text(json.dumps({"run": {"stage": stage}, "data": {"train": train}}))
    return read_run(folder)


def test_pairs_of_every_source_are_shown_the_largest_margin_first(tmp_path):
    (pairs,) = read_preferences(read_run(write_pairs(tmp_path / "pairs")))
    assert pairs.counts == {"correctness": 20, "dropout_ntp": 2}
    keys = [int(str(row["prompt_key"])[2:5]) for row in pairs.chosen]
    assert sorted(keys[:4]) == [18, 19, 20, 21]
    assert keys[4:] == [17, 16, 15, 14]
    assert len(pairs.chosen) == PAIRS_SHOWN
    assert [row["text"] for row in pairs.rejected] == [f"bad {key}</think>\\boxed{{2}}" for key in keys]
    assert pairs.margins[keys.index(19)] == 0.19
    assert all(row["image_png"] and row["question"] == f"What is {row['answer']}?" for row in pairs.chosen)


def test_of_a_prompt_one_pair_is_shown(tmp_path):
    same = [sample(1, margin=2.0), sample(2)]
    same[1] = ShardSample(**{**vars(same[1]), "key": "q-001-pair1"})
    write_shards(same, tmp_path / "pairs")
    (pairs,) = read_preferences(read_run(tmp_path / "pairs"))
    assert [row["prompt_key"] for row in pairs.chosen] == ["q-001-pair0"]
    assert pairs.counts == {}


def test_a_run_shows_the_pairs_that_it_trained_on(tmp_path):
    folder = str(write_pairs(tmp_path / "pairs"))
    for number, (stage, train) in enumerate([("mpo", folder), ("reward_model", [{"path": folder, "weight": 1}])]):
        (pairs,) = read_preferences(write_run(tmp_path / str(number), train, stage))
        assert str(pairs.folder) == folder
    assert read_preferences(write_run(tmp_path / "grpo", folder, "grpo")) == []


def test_missing_and_damaged_shards_are_noted(tmp_path):
    run = write_run(tmp_path / "moved", "data/none")
    assert read_preferences(run) == []
    assert "data.train 'data/none' is not on this machine" in run.notes[-1]
    folder = write_pairs(tmp_path / "pairs")
    next(folder.glob("*.tar.idx")).unlink()
    run = write_run(tmp_path / "damaged", str(folder))
    assert read_preferences(run) == []
    assert run.notes[-1].startswith("no pairs are shown: ")


def test_chosen_stands_beside_rejected_on_the_page(tmp_path):
    write_shards([sample(1, rejected=HOSTILE.replace("\ud800", "").replace("\x00", ""))], tmp_path / "pairs")
    page = Page(write_report(tmp_path / "pairs").read_text(encoding="utf-8"))
    text = " ".join(page.text.split())
    assert "expected 1 correctness margin 1.00" in text
    assert text.index("good 1</think>\\boxed{1}") < text.index("rejected") < text.index("</span></script>")
    assert page.elements.count("img") == 1
    assert "script" not in page.elements
    assert "no curves" not in text
