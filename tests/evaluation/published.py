"""Small made files in exactly the formats in which the benchmarks are published: columns, types, encodings."""

from __future__ import annotations

import io
import json

import pyarrow
from PIL import Image
from pyarrow import parquet

IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
TEXT = pyarrow.string()


def picture(color, kind="PNG", size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format=kind)
    return buffer.getvalue()


def image(color, kind="PNG"):
    return {"bytes": picture(color, kind), "path": "image.png"}


def write(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pyarrow.schema(columns)
    unknown = {name for row in rows for name in row} - set(schema.names)
    assert not unknown
    full = [{name: row.get(name) for name in schema.names} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(full, schema=schema), path)
    return path


NUMBERED = [(f"image_{n}", IMAGE) for n in range(1, 8)]


def write_mmmu(folder):
    columns = [
        ("id", TEXT), ("question", TEXT), ("options", TEXT), ("explanation", TEXT), *NUMBERED, ("img_type", TEXT),
        ("answer", TEXT), ("topic_difficulty", TEXT), ("question_type", TEXT), ("subfield", TEXT),
    ]  # fmt: skip
    art = {
        "id": "validation_Art_Theory_3",
        "question": "Compare <image 2> with <image 1>. Is <image 1> older?",
        "options": "['Yes, it\\'s older', \"No\", '<image 3>']",
        "image_1": image("red"), "image_2": image("blue", "JPEG"), "image_3": image("green", "GIF"),
        "img_type": "['Paintings']", "answer": "B", "topic_difficulty": "Easy", "question_type": "multiple-choice",
        "subfield": "Art Theory",
    }  # fmt: skip
    accounting = {
        "id": "validation_Accounting_11", "question": "<image 1> What is the ratio?", "options": "[]",
        "image_1": image("white"), "answer": "['24/7', '3.429']", "topic_difficulty": "Hard", "question_type": "open",
    }  # fmt: skip
    write(folder / "Accounting" / "validation-00000-of-00001.parquet", columns, [accounting])
    write(folder / "Accounting" / "dev-00000-of-00001.parquet", columns, [{**accounting, "id": "dev_Accounting_1"}])
    write(folder / "Art_Theory" / "validation-00000-of-00001.parquet", columns, [art])


def write_mmmu_pro(folder):
    standard = [
        ("id", TEXT), ("question", TEXT), ("options", TEXT), ("explanation", TEXT), *NUMBERED, ("img_type", TEXT),
        ("answer", TEXT), ("topic_difficulty", TEXT), ("subject", TEXT),
    ]  # fmt: skip
    options = [f"option {n}" for n in range(10)]
    row = {
        "id": "test_History_1", "question": "<image 1> Which one?", "options": str(options), "image_1": image("red"),
        "answer": "J", "topic_difficulty": "Medium", "subject": "History",
    }  # fmt: skip
    write(folder / "standard (10 options)" / "test-00000-of-00001.parquet", standard, [row])
    vision = [("id", TEXT), ("image", IMAGE), ("options", TEXT), ("answer", TEXT), ("subject", TEXT)]
    row = {"id": "test_History_1", "image": image("blue"), "options": str(options), "answer": "C", "subject": "History"}
    write(folder / "vision" / "test-00000-of-00001.parquet", vision, [row])


def mathvista_rows():
    details = {
        "category": "math-targeted-vqa", "context": "geometry diagram", "grade": "high school", "img_height": 30,
        "img_width": 40, "language": "english", "skills": ["geometry reasoning", "arithmetic reasoning"],
        "source": "Geometry3K", "split": "testmini", "task": "geometry problem solving",
    }  # fmt: skip
    return [
        {
            "pid": "1", "question": "What is x?", "image": "images/1.jpg", "choices": None, "unit": "cm",
            "precision": 1.0, "answer": "1.2", "question_type": "free_form", "answer_type": "float",
            "metadata": details,
            "query": "Hint: Please answer the question requiring a floating-point number.\nQuestion: What is x?",
        },
        {
            "pid": "2", "question": "Which is larger?", "image": "images/2.jpg", "choices": ["left", "right", "equal"],
            "unit": None, "precision": None, "answer": "equal", "question_type": "multi_choice", "answer_type": "text",
            "metadata": details,
            "query": "Hint: Give the letter.\nQuestion: Which is larger?\nChoices:\n(A) left\n(B) right\n(C) equal",
        },
    ]  # fmt: skip


def write_mathvista(folder):
    details = pyarrow.struct(
        [
            ("category", TEXT), ("context", TEXT), ("grade", TEXT), ("img_height", pyarrow.int64()),
            ("img_width", pyarrow.int64()), ("language", TEXT), ("skills", pyarrow.list_(TEXT)), ("source", TEXT),
            ("split", TEXT), ("task", TEXT),
        ]
    )  # fmt: skip
    columns = [
        ("pid", TEXT), ("question", TEXT), ("image", TEXT), ("decoded_image", IMAGE), ("choices", pyarrow.list_(TEXT)),
        ("unit", TEXT), ("precision", pyarrow.float64()), ("answer", TEXT), ("question_type", TEXT),
        ("answer_type", TEXT), ("metadata", details), ("query", TEXT),
    ]  # fmt: skip
    rows = [{**row, "decoded_image": image("red", "JPEG")} for row in mathvista_rows()]
    write(folder / "data" / "testmini-00000-of-00001.parquet", columns, rows)


def write_mathvista_json(folder):
    (folder / "images").mkdir(parents=True)
    for number in (1, 2):
        (folder / "images" / f"{number}.jpg").write_bytes(picture("red", "JPEG"))
    content = {row["pid"]: row for row in mathvista_rows()}
    (folder / "testmini.json").write_text(json.dumps(content))


def write_mathvision(folder):
    columns = [
        ("id", TEXT), ("question", TEXT), ("options", pyarrow.list_(TEXT)), ("image", TEXT), ("decoded_image", IMAGE),
        ("answer", TEXT), ("solution", TEXT), ("level", pyarrow.int64()), ("subject", TEXT),
    ]  # fmt: skip
    rows = [
        {
            "id": "4", "question": "Which piece is missing?\n<image1>", "options": ["A", "B", "C", "D", "E"],
            "image": "images/4.jpg", "decoded_image": image("red"), "answer": "D", "level": 2, "subject": "logic",
        },
        {
            "id": "7", "question": "How many cubes?\n<image1>", "options": [], "image": "images/7.jpg",
            "decoded_image": image("blue"), "answer": "29", "level": 5, "subject": "counting",
        },
    ]  # fmt: skip
    write(folder / "data" / "testmini-00000-of-00001.parquet", columns, rows)


def write_olympiadbench(folder):
    columns = [
        ("id", pyarrow.int64()), ("question", TEXT), ("solution", pyarrow.list_(TEXT)),
        ("final_answer", pyarrow.list_(TEXT)), ("context", TEXT), *[(f"image_{n}", IMAGE) for n in range(1, 10)],
        ("modality", TEXT), ("difficulty", TEXT), ("is_multiple_answer", pyarrow.bool_()), ("unit", TEXT),
        ("answer_type", TEXT), ("error", TEXT), ("question_type", TEXT), ("subfield", TEXT), ("subject", TEXT),
        ("language", TEXT),
    ]  # fmt: skip
    row = {
        "id": 1606, "question": "Find the speed.\n\n<image_1>", "solution": ["..."], "final_answer": ["$3.5$"],
        "context": "A ball rolls.", "image_1": image("red"), "modality": "Multimodal", "difficulty": "Competition",
        "is_multiple_answer": False, "unit": "m/s", "answer_type": "Numerical", "error": "1e-1",
        "question_type": "Open-ended", "subfield": "Mechanics", "subject": "Physics", "language": "English",
    }  # fmt: skip
    multiple = {
        **row, "id": 2000, "question": "Solve.", "final_answer": ["2", "3"], "unit": None, "image_1": None,
        "context": None, "is_multiple_answer": True, "subject": "Math", "subfield": "Algebra", "error": "1e-1,",
    }  # fmt: skip
    write(folder / "OE_MM_physics_en_COMP" / "OE_MM_physics_en_COMP.parquet", columns, [row, multiple])
    write(folder / "TP_TO_maths_en_COMP" / "p.parquet", columns, [{**row, "id": 9, "final_answer": None}])


def write_aime(folder):
    columns = [
        ("id", pyarrow.int64()), ("problem", TEXT), ("solution", TEXT), ("answer", TEXT), ("url", TEXT), ("year", TEXT)
    ]  # fmt: skip
    url = "wiki/2024_AIME_II_Problems/Problem_4"
    rows = [{"id": 60, "problem": "Find $m+n$.", "solution": "...", "answer": "033", "url": url, "year": "2024"}]
    write(folder / "train-00000-of-00001.parquet", columns, rows)
