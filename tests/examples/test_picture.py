"""The README's picture from the evaluations of a run."""

import base64
import dataclasses
import io
import json

from PIL import Image

from examples.digits import picture
from megatron_r1v2.evaluation.pass_at_1 import EvaluationResult, write_evaluation


def write_run(folder, answers):
    """Write evaluations of three stages; `answers` has the texts before and after, and whether each was right."""
    fields = dict.fromkeys(EvaluationResult.__dataclass_fields__, 0)
    none = EvaluationResult(**{**fields, "runs": (0.5,), "pass_at_k": {}, "maj_at_k": {}, "finished": ""})
    png = io.BytesIO()
    Image.new("RGB", (32, 16), "white").save(png, format="PNG")
    image = base64.b64encode(png.getvalue()).decode()
    for name, rate in zip(picture.STAGES, (0.5, 0.75, 0.9), strict=True):
        interval = (rate - 0.05, rate + 0.05)
        write_evaluation(folder, dataclasses.replace(none, name=name, pass_at_1=rate, pass_at_1_interval=interval))
    for place, name in enumerate((picture.STAGES[0], picture.STAGES[-1])):
        lines = [
            json.dumps({"prompt_key": key, "question": f"question {key}", "image_png": image} | dict(
                zip(("text", "correct"), both[place], strict=True)))
            for key, both in answers.items()
        ]  # fmt: skip
        (folder / f"evaluation-{name}.rollouts.jsonl").write_text("\n".join(lines) + "\n")


def test_it_shows_the_stages_and_answers_that_turned_right(tmp_path):
    write_run(
        tmp_path,
        {
            "a": (("3+5=9", False), ("3+5=8", True)),
            "b": (("stays right", True), ("stays right", True)),
            "c": (("stays wrong", False), ("stays wrong", False)),
        },
    )
    output = tmp_path / "docs" / "demo.svg"
    output.parent.mkdir()
    for _ in range(2):
        picture.main(["--run", str(tmp_path), "--output", str(output)])
        text = output.read_text()
        assert all(f"{value} %" in text for value in ("50.0", "75.0", "90.0"))
        assert "question a" in text
        assert "3+5=9" in text
        assert "3+5=8" in text
        assert "stays" not in text
        drawn, text = text, output.read_text()
        assert drawn == text


def test_a_run_without_such_answers_has_the_bars_alone(tmp_path):
    write_run(tmp_path, {"a": (("right", True), ("right", True))})
    picture.main(["--run", str(tmp_path), "--output", str(tmp_path / "demo.svg")])
    assert "question" not in (tmp_path / "demo.svg").read_text()
