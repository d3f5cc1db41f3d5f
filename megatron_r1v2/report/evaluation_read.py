"""Evaluations in run folders: results, breakdowns, and a choice of responses to look at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_r1v2.evaluation.pass_at_1 import EvaluationResult, read_evaluation
from megatron_r1v2.report.read import Json, each_line, rows_at

RESPONSES_SHOWN = 200
BENCHMARK = "benchmark"
_MOST_GROUPS = 60  # as many subjects as benchmarks have; a column with more names single rows
KINDS = ("hallucinated", "judged", "cut", "wrong", "right")
"""Kinds of responses, the rarest first; one response can be of several."""


@dataclass
class Group:
    """The responses with one value of one metadata field."""

    correct: int = 0
    responses: int = 0
    prompts: set[str] = field(default_factory=set)

    @property
    def rate(self) -> float:
        """Return Pass@1 of the group."""
        return self.correct / self.responses


@dataclass
class Evaluation:
    """One evaluation."""

    folder: Path
    result: EvaluationResult
    groups: dict[str, dict[str, Group]] = field(default_factory=dict)
    """Metadata field -> value -> its responses; both in order of appearance."""
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    """Responses of each kind."""
    responses: list[Json] = field(default_factory=list)
    """Rows to show, each with the picture of its prompt."""

    @property
    def benchmark(self) -> str:
        """Return the benchmark that all prompts are of; "" where there is none, or several."""
        names = list(self.groups.get(BENCHMARK, {}))
        return names[0] if len(names) == 1 else ""

    @property
    def num_responses(self) -> int:
        """Return how many responses there are."""
        return self.counts["right"] + self.counts["wrong"]


def read_evaluations(folders: Sequence[Path | str], notes: list[str]) -> list[Evaluation]:
    """Read every finished evaluation in run folders.

    Args:
        notes: gets a line for each file that cannot be read.

    Returns:
        The evaluations, by folder and name.

    Raises:
        ValueError: a folder does not exist, or there is no evaluation in any of them.
    """
    found = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"run folder {str(folder)!r} does not exist; give a folder that evaluate has written to")
        for path in sorted(folder.glob("evaluation-*.json")):
            try:
                evaluation = Evaluation(folder, read_evaluation(path))
            except ValueError as error:
                notes.append(str(error))
                continue
            rows = path.with_suffix(".rollouts.jsonl")
            if rows.is_file():
                _read_rows(evaluation, rows, notes)
            found.append(evaluation)
    if not found:
        raise ValueError(
            f"there is no evaluation-NAME.json in {', '.join(map(str, folders))}; run python -m "
            "megatron_r1v2 evaluate first"
        )
    return found


def kinds_of(row: Json) -> list[str]:
    """Return the kinds, of `KINDS`, of a row of a rollouts file."""
    claims = row.get("claims")
    claims = claims if isinstance(claims, list) else []
    is_kind = {
        "hallucinated": any(claim[-1] is False for claim in claims if isinstance(claim, list) and claim),
        "judged": isinstance(row.get("judge"), dict),
        "cut": row.get("finish_reason") == "length",
        "wrong": not row.get("correct"),
        "right": bool(row.get("correct")),
    }
    return [kind for kind in KINDS if is_kind[kind]]


def _read_rows(evaluation: Evaluation, path: Path, notes: list[str]) -> None:
    offsets: dict[str, list[int]] = {kind: [] for kind in KINDS}
    pictures: dict[str, int] = {}
    for offset, row in each_line(path, notes):
        key = str(row.get("prompt_key"))
        for kind in kinds_of(row):
            evaluation.counts[kind] += 1
            offsets[kind].append(offset)
        if row.get("image_png"):
            pictures.setdefault(key, offset)
        metadata = row.get("metadata")
        for name, value in metadata.items() if isinstance(metadata, dict) else ():
            group = evaluation.groups.setdefault(str(name), {}).setdefault(str(value), Group())
            group.correct += bool(row.get("correct"))
            group.responses += 1
            group.prompts.add(key)
    evaluation.groups = {name: found for name, found in evaluation.groups.items() if len(found) <= _MOST_GROUPS}
    evaluation.responses = rows_at(path, _choice(offsets))
    for row in evaluation.responses:
        picture = pictures.get(str(row.get("prompt_key")))
        if picture is not None and not row.get("image_png"):
            row["image_png"] = rows_at(path, [picture])[0].get("image_png")


def _choice(offsets: dict[str, list[int]]) -> list[int]:
    """Return a few offsets of each kind in turn, spread over the file, in its order."""
    shares = {kind: _spread(of_kind, RESPONSES_SHOWN) for kind, of_kind in offsets.items()}
    chosen: set[int] = set()
    for place in range(RESPONSES_SHOWN):
        for kind in KINDS:
            if place < len(shares[kind]) and len(chosen) < RESPONSES_SHOWN:
                chosen.add(shares[kind][place])
    return sorted(chosen)


def _spread(values: Sequence[int], count: int) -> list[int]:
    """Return at most `count` values, ordered so that the first few are spread over all."""
    if not values:
        return []
    order: list[int] = []
    step = len(values)
    seen: set[int] = set()
    while len(order) < min(count, len(values)):
        for index in range(0, len(values), step):
            if index not in seen:
                seen.add(index)
                order.append(values[index])
        step = max(1, step // 2)
    return order[:count]


def judge_words(row: Json) -> str:
    """Return the words of the judge on a row of a rollouts file; "" where nobody asked it."""
    judge = row.get("judge")
    if not isinstance(judge, dict):
        return ""
    decided = judge.get("verdict")
    verdict = "no verdict, counted as wrong" if decided is None else "right" if decided else "wrong"
    text = judge.get("text")
    return f"{judge.get('model', 'judge')}: {verdict}\n{text if isinstance(text, str) else json.dumps(text)}"
