"""The meaning of a row of each benchmark: question, options, images, answer, and the groups of its results.

Column names and encodings are those of the published files; each reader names its source.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_r1v2.data.samples import SampleError
from megatron_r1v2.evaluation.benchmarks.files import RowOfFile, image_bytes, text_list
from megatron_r1v2.evaluation.benchmarks.prompts import LETTERS, options_text
from megatron_r1v2.rewards.answer import last_boxed
from megatron_r1v2.rewards.answers.normalisation import normalise
from megatron_r1v2.rewards.answers.numbers import read_number
from megatron_r1v2.types import AnswerType


@dataclass(frozen=True)
class Question:
    """A row that is understood.

    Example: id "validation_Art_3", text "<image 1> Who painted this?", options ("Monet", "Manet"), answer "B",
    answer_type "choice", images {1: b"..."}, metadata {"subject": "Art"}.
    """

    id: str
    """Unique in the benchmark."""
    text: str
    """The question, its images marked as in the data set."""
    answer: str
    answer_type: AnswerType
    options: tuple[str, ...] = ()
    """Shown below the text, each behind its letter."""
    alternatives: tuple[str, ...] = ()
    """Further right answers."""
    tolerances: tuple[float, ...] = ()
    """Distances from the answer at which a number is still right."""
    images: Mapping[int, bytes] = field(default_factory=dict)
    """Encoded, by their number in the marks."""
    metadata: Mapping[str, str] = field(default_factory=dict)


# The authors' scorer rounds both numbers to two decimals (eval_utils.py of MMMU-Benchmark/MMMU).
_MMMU_ROUNDING = (0.005,)

Reader = Callable[[RowOfFile, Path], Question | None]
"""(row, folder of images beside the data) -> its question, or None: not part of the evaluation."""


def aime_2024(row: RowOfFile, images: Path) -> Question:  # noqa: ARG001
    """AIME 2024: id, problem, solution, answer, or the same with capitals; the answer is a whole number to 999.

    Sources: HuggingFaceH4/aime_2024 (id, problem, solution, answer, url, year), Maxwell-Jia/AIME_2024 (ID, Problem,
    Solution, Answer), math-ai/aime24 (the answer boxed in its solution).
    """
    # The published copies differ in capitals only.
    small = {name.lower(): value for name, value in row.items()}
    answer = small.get("answer")
    if answer is None:
        answer = last_boxed(_text(small, "solution"))
    if answer is None or not re.fullmatch(r"\d{1,3}", str(answer).strip(), re.ASCII):
        raise SampleError(f"the answer must be a whole number from 0 to 999, got {answer!r}")
    metadata = {"year": str(small["year"])} if small.get("year") else {}
    test = re.search(r"AIME[_ -]+(II?)(?!I)|^2024-(II?)-", f"{small.get('url') or ''} {small.get('id')}".strip())
    if test:
        metadata["test"] = f"AIME {test[1] or test[2]}"
    return Question(str(_field(small, "id")), _text(small, "problem"), str(int(str(answer))), "math", metadata=metadata)


def mmmu(row: RowOfFile, images: Path) -> Question:
    """MMMU: options and, for open questions with several right answers, answer are the text of a Python list.

    Source: MMMU/MMMU (id, question, options, explanation, image_1 ... image_7, img_type, answer, topic_difficulty,
    question_type, subfield); the subject is the middle of the id.
    """
    name = _text(row, "id")
    subject = re.fullmatch(r"[a-z]+_(.+)_\d+", name)
    metadata = {
        "subject": subject[1].replace("_", " ") if subject else "",
        "difficulty": str(row.get("topic_difficulty") or ""),
        "question_type": str(row.get("question_type") or ""),
    }
    question, found = _text(row, "question"), _numbered_images(row, images)
    if row.get("question_type", "multiple-choice") == "multiple-choice":
        options = tuple(text_list(_field(row, "options"), "options"))
        letter = _letter(_text(row, "answer"), options)
        others = _right_text(letter, options)
        return Question(name, question, letter, "choice", options, others, images=found, metadata=_filled(metadata))
    answer, *more = _open_answers(_text(row, "answer"))
    return Question(
        name,
        question,
        answer,
        "math",
        alternatives=tuple(more),
        tolerances=_MMMU_ROUNDING if read_number(normalise(answer)) is not None else (),
        images=found,
        metadata=_filled(metadata),
    )


def mmmu_pro(row: RowOfFile, images: Path) -> Question:
    """MMMU-Pro: the standard sets as MMMU, with up to ten options; in the vision set the image holds all of it.

    Source: MMMU/MMMU_Pro, "standard (4 options)" and "standard (10 options)" (id, question, options, image_1 ...
    image_7, answer, topic_difficulty, subject) and "vision" (id, image, options, answer, subject).
    """
    options = tuple(text_list(_field(row, "options"), "options"))
    vision = "question" not in row
    metadata = {
        "subject": str(row.get("subject") or "").replace("_", " "),
        "difficulty": str(row.get("topic_difficulty") or ""),
        "setting": "vision" if vision else "standard",
    }
    found = _only_image(row, "image", images) if vision else _numbered_images(row, images)
    if vision and not found:
        raise SampleError("the vision set has no image in this row")
    letter = _letter(_text(row, "answer"), options)
    return Question(
        _text(row, "id"),
        "" if vision else _text(row, "question"),
        letter,
        "choice",
        () if vision else options,
        _right_text(letter, options),
        images=found,
        metadata=_filled(metadata),
    )


def mathvista(row: RowOfFile, images: Path) -> Question:
    """MathVista: the published `query` holds hint, question, unit and choices; of a choice the answer is its text.

    `precision` is the decimals that a number is rounded to, so it may be half of the last one away.

    Source: AI4Math/MathVista (pid, question, image, decoded_image, choices, unit, precision, answer, question_type,
    answer_type, metadata, query).
    """
    details = row.get("metadata") or {}
    if not isinstance(details, Mapping):
        raise SampleError(f"metadata must be an object, got {details!r:.80}")
    names = ("task", "category", "source", "grade", "context", "language")
    metadata = {name: str(details[name]) for name in names if details.get(name)}
    metadata["question_type"] = str(row.get("question_type") or "")
    metadata["skills"] = ", ".join(text_list(details.get("skills"), "skills"))
    found = _only_image(row, "decoded_image", images) or _only_image(row, "image", images)
    text, answer = str(row.get("query") or "") or _text(row, "question"), _text(row, "answer")
    pid = str(_field(row, "pid"))
    if row.get("question_type") == "multi_choice":
        choices = text_list(_field(row, "choices"), "choices")
        if answer not in choices:
            raise SampleError(f"the answer {answer!r} is none of the choices {choices}")
        options = () if row.get("query") else tuple(choices)
        letter = LETTERS[choices.index(answer)]
        others = _right_text(letter, tuple(choices))
        return Question(pid, text, letter, "choice", options, others, images=found, metadata=_filled(metadata))
    tolerances: tuple[float, ...] = ()
    if row.get("answer_type") == "float" and row.get("precision") is not None:
        tolerances = (0.5 * 10.0 ** -_number(row["precision"], "precision"),)
    return Question(pid, text, answer, "math", tolerances=tolerances, images=found, metadata=_filled(metadata))


def mathvision(row: RowOfFile, images: Path) -> Question:
    """MathVision: options may be nothing but letters, which are drawn in the image; none means an open question.

    Source: MathLLMs/MathVision (id, question, options, image, decoded_image, answer, solution, level, subject).
    """
    options = tuple(text_list(row.get("options"), "options"))
    answer = str(_field(row, "answer"))
    answer = _letter(answer, options) if options else answer
    return Question(
        str(_field(row, "id")),
        _text(row, "question"),
        answer,
        "choice" if options else "math",
        options,
        _right_text(answer, options) if options else (),
        images=_only_image(row, "decoded_image", images) or _only_image(row, "image", images),
        metadata=_filled({"subject": str(row.get("subject") or ""), "level": str(row.get("level") or "")}),
    )


def olympiadbench(row: RowOfFile, images: Path) -> Question | None:
    """OlympiadBench: final_answer is a list; theorems to prove have none and are left out.

    `error` is how far a number may be away, for all answers or for each behind commas, where nothing means not at all.

    Sources: Hothan/OlympiadBench (id, question, solution, final_answer, context, image_1 ..., modality, difficulty,
    is_multiple_answer, unit, answer_type, error, question_type, subfield, subject, language), lmms-lab/OlympiadBench
    (question_id, images, source), and the JSON of the authors (images: file names).
    """
    answers = text_list(row.get("final_answer"), "final_answer")
    if not answers:
        return None
    text = "\n".join(part for part in (str(row.get("context") or ""), _text(row, "question")) if part)
    if row.get("unit"):
        text += f"\nThe unit of the answer is {row['unit']}."
    listed = row.get("images") or []
    if not isinstance(listed, list):
        raise SampleError(f"images must be a list, got {listed!r:.80}")
    encoded = [image_bytes(value, images) for value in listed]
    found = {number: data for number, data in enumerate(encoded, start=1) if data} or _numbered_images(row, images)
    metadata = {name: str(row.get(name) or "") for name in ("subject", "subfield", "language", "answer_type", "source")}
    name = row["id"] if "id" in row else _field(row, "question_id")
    errors = str(row.get("error") or "")
    tolerances = tuple(_number(error.strip() or "0", "error") for error in errors.split(",")) if errors else ()
    if len(tolerances) not in (0, 1, len(answers)):
        raise SampleError(f"error {errors!r} is neither for all answers nor for each of the {len(answers)}")
    return Question(
        str(name), text, ", ".join(answers), "math", tolerances=tolerances, images=found, metadata=_filled(metadata)
    )


READERS: Mapping[str, tuple[str, Reader]] = {
    "aime2024": ("AIME 2024", aime_2024),
    "mmmu": ("MMMU", mmmu),
    "mmmu_pro": ("MMMU-Pro", mmmu_pro),
    "mathvista": ("MathVista", mathvista),
    "mathvision": ("MathVision", mathvision),
    "olympiadbench": ("OlympiadBench", olympiadbench),
}
"""Name on the command line -> name in tables, reader."""


WHOLE_SIZES: Mapping[str, tuple[int, ...]] = {
    "AIME 2024": (30,),
    "MMMU": (900, 10_500),
    "MMMU-Pro": (1730,),
    "MathVista": (1000,),
    "MathVision": (304, 3040),
}
"""Questions of the published sets (validation and test; testmini and test), by name in tables."""


def whole_size(benchmarks: set[str], available: int) -> int:
    """Return the questions of the published set that a data set is the whole or a part of.

    Args:
        benchmarks: of its samples; of none or several the data set itself is the whole.
        available: samples in the data set.
    """
    sizes = WHOLE_SIZES.get(next(iter(benchmarks), ""), ()) if len(benchmarks) == 1 else ()
    return min((size for size in sizes if size >= available), default=available)


def shown_options(question: Question) -> str:
    """Return the question with its options below it."""
    return f"{question.text}\n{options_text(question.options)}" if question.options else question.text


def _field(row: RowOfFile, name: str) -> object:
    if row.get(name) is None:
        raise SampleError(f"the row has no {name!r}, only {', '.join(sorted(row))}; is it a file of this benchmark?")
    return row[name]


def _text(row: RowOfFile, name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str):
        raise SampleError(f"{name} must be text, got {value!r:.80}")
    return value.strip()


def _number(value: object, name: str) -> float:
    try:
        # By its text: parquet has numbers of many types.
        return float(str(value))
    except (TypeError, ValueError) as error:
        raise SampleError(f"{name} must be a number, got {value!r:.80}") from error


def _letter(answer: str, options: tuple[str, ...]) -> str:
    letter = answer.strip().upper()
    if len(letter) != 1 or letter not in LETTERS[: len(options)]:
        raise SampleError(f"the answer {answer!r} is no letter of the {len(options)} options")
    return letter


def _right_text(letter: str, options: tuple[str, ...]) -> tuple[str, ...]:
    """Return the text of the right option, a right answer too, unless it is an image or looks like another's letter."""
    text = options[LETTERS.index(letter)].strip()
    return () if re.fullmatch(r"|\W*[A-Za-z]\W*|.*<image.*", text, re.DOTALL) else (text,)


def _open_answers(answer: str) -> list[str]:
    """Return the right answers: those of a list of texts, or the answer itself, which may be a list or an interval."""
    try:
        listed = ast.literal_eval(answer) if answer.startswith("[") else None
    except (ValueError, SyntaxError):
        listed = None
    if isinstance(listed, list) and listed and all(isinstance(item, str) for item in listed):
        return listed
    return [answer]


def _numbered_images(row: RowOfFile, folder: Path) -> dict[int, bytes]:
    names = {int(match[1]): name for name in row if (match := re.fullmatch(r"image_(\d+)", name))}
    found = {number: image_bytes(row[names[number]], folder) for number in sorted(names)}
    return {number: data for number, data in found.items() if data}


def _only_image(row: RowOfFile, name: str, folder: Path) -> dict[int, bytes]:
    data = image_bytes(row.get(name), folder)
    return {1: data} if data else {}


def _filled(metadata: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in metadata.items() if value}
