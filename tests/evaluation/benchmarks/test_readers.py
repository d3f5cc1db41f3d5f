"""The benchmarks from made files in their published formats to shards that are read back."""

import io
import json

import pytest
from PIL import Image

pytest.importorskip("pyarrow")

from megatron_r1v2.evaluation.benchmarks.prompts import CHOICE_INSTRUCTION, OPEN_INSTRUCTION
from megatron_r1v2.evaluation.benchmarks.readers import READERS, WHOLE_SIZES, whole_size
from megatron_r1v2.evaluation.benchmarks.samples import benchmark_samples
from megatron_r1v2.rewards.answer import answer_is_correct
from tests.evaluation import published


def read(name, folder, only="*"):
    return list(benchmark_samples(name, folder, folder, only))


def content(sample):
    return sample.messages[-1]["content"]


def color(sample, index):
    data = list(sample.images.values())[index]
    return Image.open(io.BytesIO(data)).convert("RGB").resize((1, 1)).getpixel((0, 0))


def near(found, expected):
    return all(abs(a - b) < 6 for a, b in zip(found, expected, strict=True))


def test_mmmu_several_images_where_they_are_marked(tmp_path):
    published.write_mmmu(tmp_path)
    accounting, art = read("mmmu", tmp_path, "validation-*")
    assert art.key == "mmmu-validation_Art_Theory_3"
    assert content(art) == (
        "Compare <image> with <image>. Is (image 1) older?\nA. Yes, it's older\nB. No\nC. <image>\n"
        + CHOICE_INSTRUCTION
    )
    assert list(art.images) == ["0.jpg", "1.png", "2.png"]
    assert near(color(art, 0), (0, 0, 255))
    assert near(color(art, 1), (255, 0, 0))
    assert (art.answer, art.answer_type) == ("B", "choice")
    assert art.metadata == {
        "benchmark": "MMMU", "subject": "Art Theory", "difficulty": "Easy", "question_type": "multiple-choice",
    }  # fmt: skip
    assert accounting.tolerances == (0.005,)  # two decimals, as the authors round
    assert content(accounting) == "<image> What is the ratio?\n" + OPEN_INSTRUCTION
    assert (accounting.answer, accounting.answer_type, accounting.alternatives) == ("24/7", "math", ("3.429",))
    assert len(read("mmmu", tmp_path)) == 3


def test_mmmu_pro_standard_and_vision(tmp_path):
    published.write_mmmu_pro(tmp_path)
    (standard,) = read("mmmu_pro", tmp_path / "standard (10 options)")
    assert "J. option 9\n" + CHOICE_INSTRUCTION in content(standard)
    assert (standard.answer, standard.metadata["subject"], standard.metadata["setting"]) == ("J", "History", "standard")
    (vision,) = read("mmmu_pro", tmp_path / "vision")
    assert content(vision) == "<image>\n" + CHOICE_INSTRUCTION
    assert (vision.answer, vision.alternatives, vision.metadata["setting"]) == ("C", ("option 2",), "vision")
    with pytest.raises(ValueError, match=r"was used by .*already; give one split or set \(--only\)"):
        read("mmmu_pro", tmp_path)


@pytest.mark.parametrize("write", [published.write_mathvista, published.write_mathvista_json])
def test_mathvista_choices_are_texts_and_become_letters(tmp_path, write):
    write(tmp_path)
    free, choice = read("mathvista", tmp_path)
    assert (free.answer, free.answer_type, free.tolerances) == ("1.2", "math", (0.05,))
    assert content(free).startswith("<image>\nHint: Please answer")
    assert content(free).endswith(OPEN_INSTRUCTION)
    assert (choice.answer, choice.answer_type, choice.alternatives) == ("C", "choice", ("equal",))
    assert content(choice).endswith("(C) equal\n" + CHOICE_INSTRUCTION)
    assert choice.metadata["task"] == "geometry problem solving"
    assert choice.metadata["skills"] == "geometry reasoning, arithmetic reasoning"


def test_mathvision_options_that_are_in_the_image(tmp_path):
    published.write_mathvision(tmp_path)
    choice, free = read("mathvision", tmp_path)
    assert content(choice) == ("Which piece is missing?\n<image>\nOptions: A, B, C, D, E\n" + CHOICE_INSTRUCTION)
    assert (choice.answer, choice.answer_type, choice.metadata["level"]) == ("D", "choice", "2")
    assert (free.answer, free.answer_type) == ("29", "math")


def test_olympiadbench_answers_are_lists_and_proofs_are_left_out(tmp_path):
    published.write_olympiadbench(tmp_path)
    one, two = read("olympiadbench", tmp_path)
    assert content(one) == (
        "A ball rolls.\nFind the speed.\n\n<image>\nThe unit of the answer is m/s.\n" + OPEN_INSTRUCTION
    )
    assert (one.answer, two.answer) == ("$3.5$", "2, 3")
    assert (one.tolerances, two.tolerances) == ((0.1,), (0.1, 0.0))
    assert two.metadata["subfield"] == "Algebra"
    assert not two.images


@pytest.mark.parametrize(
    ("error", "message"), [("small", "error must be a number"), ("1,2,3", "nor for each of the 2")]
)
def test_an_error_that_cannot_be_meant(tmp_path, error, message):
    row = {"id": 1, "question": "?", "final_answer": ["2", "3"], "error": error}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=f"rows.json, row 1: .*{message}"):
        read("olympiadbench", tmp_path)


def test_the_authors_json_of_olympiadbench_has_images_beside(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "2231.png").write_bytes(published.picture("red"))
    row = {
        "id": 2231, "subfield": "Geometry", "context": None, "question": "See <image_1>.", "images": ["2231.png"],
        "solution": ["..."], "final_answer": ["5"], "is_multiple_answer": False, "unit": None,
        "answer_type": "Numerical", "error": None,
    }  # fmt: skip
    (tmp_path / "OE_MM_maths_en_COMP.json").write_text(json.dumps([row]))
    path = tmp_path / "OE_MM_maths_en_COMP.json"
    (sample,) = benchmark_samples("olympiadbench", path, tmp_path / "images")
    assert content(sample).startswith("See <image>.")


@pytest.mark.parametrize(
    "rows",
    [
        [{"ID": "2024-II-4", "Problem": "Find $m+n$.", "Solution": "...", "Answer": 33}],
        [{"id": 60, "problem": "Find $m+n$.", "solution": r"\boxed{33}", "url": "2024_AIME_II_Problems/Problem_4"}],
    ],
)
def test_aime_in_its_published_forms(tmp_path, rows):
    published.write_aime(tmp_path / "h4")
    (tmp_path / "aime.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (expected,) = read("aime2024", tmp_path / "h4")
    (sample,) = read("aime2024", tmp_path / "aime.jsonl")
    assert expected.answer == sample.answer == "33"
    assert content(sample) == content(expected) == "Find $m+n$.\n" + OPEN_INSTRUCTION
    assert sample.metadata["test"] == expected.metadata["test"] == "AIME II"
    assert sample.answer_type == "math"


@pytest.mark.parametrize("box", [r"33^\circ", "n=33", "033", "33.", "33.0", "66/2", "33 cm", "2^5+1"])
def test_a_number_is_right_however_it_is_written(tmp_path, box):
    published.write_aime(tmp_path)
    (sample,) = read("aime2024", tmp_path)
    assert answer_is_correct(rf"\boxed{{{box}}}", sample.answer, sample.answer_type)
    assert not answer_is_correct(rf"\boxed{{{box}}}", "34", sample.answer_type)


@pytest.mark.parametrize(("box", "right"), [(r"1.2\text{ cm}", True), (r"\frac{6}{5}", True), ("1.3", False)])
def test_a_unit_does_not_make_mathvista_wrong(tmp_path, box, right):
    published.write_mathvista(tmp_path)
    free, _ = read("mathvista", tmp_path)
    assert answer_is_correct(rf"\boxed{{{box}}}", free.answer, free.answer_type) is right


@pytest.mark.parametrize("row", [{"solution": "no box"}, {"answer": "1000"}, {"answer": "n"}, {"answer": -1}])
def test_an_aime_answer_that_is_none_is_refused(tmp_path, row):
    (tmp_path / "aime.jsonl").write_text(json.dumps({"id": 1, "problem": "?", "solution": "", **row}))
    with pytest.raises(ValueError, match=r"aime.jsonl, row 1: the answer must be a whole number from 0 to 999"):
        read("aime2024", tmp_path)


@pytest.mark.parametrize(
    ("answer", "answers"),
    [("[0,1)", ["[0,1)"]), ("[2,3]", ["[2,3]"]), ("['a', 'b']", ["a", "b"]), ("[]", ["[]"]), ("5", ["5"])],
)
def test_an_open_answer_may_be_an_interval(tmp_path, answer, answers):
    row = {"id": "validation_Math_1", "question": "?", "options": "[]", "answer": answer, "question_type": "open"}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    (sample,) = read("mmmu", tmp_path)
    assert [sample.answer, *sample.alternatives] == answers


@pytest.mark.parametrize("details", ["text", {"skills": 5}])
def test_metadata_of_another_kind_is_refused(tmp_path, details):
    row = {"pid": "1", "question": "?", "query": "?", "answer": "1", "answer_type": "integer", "metadata": details}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=r"rows.json, row 1: (metadata|skills) must be"):
        read("mathvista", tmp_path)


@pytest.mark.parametrize(
    ("options", "alternatives"),
    [
        (["x", "12 cm"], ("12 cm",)),
        (["x", "D. melanogaster"], ("D. melanogaster",)),
        (["B", "A"], ()),
        (["x", "(a)"], ()),
        (["x", "see <image 2>"], ()),
    ],
)
def test_the_text_of_the_right_option_is_right_too(tmp_path, options, alternatives):
    row = {"id": "validation_Math_1", "question": "?", "options": str(options), "answer": "B"}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    (sample,) = read("mmmu", tmp_path)
    assert (sample.answer, sample.alternatives) == ("B", alternatives)


@pytest.mark.parametrize(
    ("benchmarks", "available", "whole"),
    [
        ({"MMMU"}, 900, 900),
        ({"MMMU"}, 30, 900),
        ({"MathVision"}, 304, 304),
        ({"MathVision"}, 305, 3040),
        ({"MathVista"}, 1001, 1001),
        ({"OlympiadBench"}, 150, 150),
        ({"MMMU", "MathVista"}, 40, 40),
        ({""}, 40, 40),
        (set(), 0, 0),
    ],
)
def test_the_whole_that_a_data_set_is_a_part_of(benchmarks, available, whole):
    assert whole_size(benchmarks, available) == whole


def test_published_sizes_are_of_benchmarks_that_are_read():
    assert WHOLE_SIZES.keys() <= {title for title, _ in READERS.values()}
