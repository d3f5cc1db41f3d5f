"""Evaluations in run folders: results, breakdowns, and a choice of responses to look at."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_r1v2.evaluation.pass_at_1 import EvaluationResult, read_evaluation
from megatron_r1v2.report.read import Json, each_line, rows_at

RESPONSES_SHOWN = 200
RUNS_SHOWN = 8
"""Of a prompt."""
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
    """Rows to show: a few runs of a few prompts, each with the picture of its prompt."""
    right_by_prompt: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Key of a prompt to show -> right responses of all its runs, and how many runs."""

    @property
    def benchmark(self) -> str:
        """Return the benchmark that all prompts are of; "" where there is none, or several."""
        names = list(self.groups.get(BENCHMARK, {}))
        return names[0] if len(names) == 1 else ""

    @property
    def num_responses(self) -> int:
        """Return how many responses there are."""
        return self.counts["right"] + self.counts["wrong"]


@dataclass
class _Rows:
    """The places of an evaluation's rows in its file."""

    path: Path
    prompts: dict[str, list[tuple[int, list[str]]]] = field(default_factory=dict)
    """Key -> (byte offset, kinds) of each response; in order of appearance."""
    pictures: dict[str, int] = field(default_factory=dict)
    """Key -> byte offset of a row with the picture of the prompt."""


def read_evaluations(folders: Sequence[Path | str], notes: list[str]) -> list[Evaluation]:
    """Read every finished evaluation in run folders.

    Args:
        notes: gets a line for each file that cannot be read.

    Returns:
        The evaluations, by folder and date. Those of the same prompts show the same ones of them.

    Raises:
        ValueError: a folder does not exist, or there is no evaluation in any of them.
    """
    found: list[Evaluation] = []
    with_rows: list[tuple[Evaluation, _Rows]] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"run folder {str(folder)!r} does not exist; give a folder that evaluate has written to")
        for path, evaluation in _read_results(folder, notes):
            found.append(evaluation)
            lines = path.with_suffix(".rollouts.jsonl")
            if lines.is_file():
                with_rows.append((evaluation, _index(evaluation, lines, notes)))
    if not found:
        raise ValueError(
            f"there is no evaluation-NAME.json in {', '.join(map(str, folders))}; run python -m "
            "megatron_r1v2 evaluate first"
        )
    for alike in _of_same_prompts(with_rows):
        chosen = _choose_prompts([rows for _, rows in alike])
        for evaluation, rows in alike:
            evaluation.responses = _read_responses(rows, chosen)
            evaluation.right_by_prompt = {
                key: (sum("right" in kinds for _, kinds in responses), len(responses))
                for key, responses in rows.prompts.items()
                if key in chosen
            }
    return found


def _read_results(folder: Path, notes: list[str]) -> list[tuple[Path, Evaluation]]:
    """Return the results in a folder with their files: those of older versions, which have no date, then by date."""
    found: list[tuple[Path, Evaluation]] = []
    for path in sorted(folder.glob("evaluation-*.json")):
        try:
            found.append((path, Evaluation(folder, read_evaluation(path))))
        except ValueError as error:
            notes.append(str(error))
    return sorted(found, key=lambda item: item[1].result.finished)


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


def _index(evaluation: Evaluation, path: Path, notes: list[str]) -> _Rows:
    """Count the responses of an evaluation, and note the places of all of them."""
    rows = _Rows(path)
    for offset, row in each_line(path, notes):
        key, kinds = str(row.get("prompt_key")), kinds_of(row)
        for kind in kinds:
            evaluation.counts[kind] += 1
        rows.prompts.setdefault(key, []).append((offset, kinds))
        if row.get("image_png"):
            rows.pictures.setdefault(key, offset)
        metadata = row.get("metadata")
        for name, value in metadata.items() if isinstance(metadata, dict) else ():
            group = evaluation.groups.setdefault(str(name), {}).setdefault(str(value), Group())
            group.correct += bool(row.get("correct"))
            group.responses += 1
            group.prompts.add(key)
    evaluation.groups = {name: found for name, found in evaluation.groups.items() if _breaks_down(name, found)}
    return rows


def _breaks_down(name: str, found: Mapping[str, Group]) -> bool:
    """Return whether a field of the metadata puts several prompts together; a benchmark may have one prompt."""
    if len(found) > _MOST_GROUPS:
        return False
    return name == BENCHMARK or any(len(group.prompts) > 1 for group in found.values())


def _of_same_prompts(every: Sequence[tuple[Evaluation, _Rows]]) -> list[list[tuple[Evaluation, _Rows]]]:
    """Return evaluations together that have a prompt in common with the first of them."""
    alike: list[list[tuple[Evaluation, _Rows]]] = []
    for each in every:
        for others in alike:
            if others[0][1].prompts.keys() & each[1].prompts.keys():
                others.append(each)
                break
        else:
            alike.append([each])
    return alike


def _choose_prompts(evaluations: Sequence[_Rows]) -> set[str]:
    """Return the keys of a few prompts, in turn one with a response of each kind, spread over the file."""
    kinds: dict[str, set[str]] = {}
    for rows in evaluations:
        for key, responses in rows.prompts.items():
            kinds.setdefault(key, set()).update(kind for _, of_response in responses for kind in of_response)
    shares = {kind: _spread([key for key in kinds if kind in kinds[key]], RESPONSES_SHOWN) for kind in KINDS}
    chosen: set[str] = set()
    room = RESPONSES_SHOWN
    in_turn = (shares[kind][place] for place in range(RESPONSES_SHOWN) for kind in KINDS if place < len(shares[kind]))
    for key in in_turn:
        num_runs = max(len(rows.prompts.get(key, ())) for rows in evaluations)
        if key not in chosen and min(num_runs, RUNS_SHOWN) <= room:
            chosen.add(key)
            room -= min(num_runs, RUNS_SHOWN)
    return chosen


def _read_responses(rows: _Rows, chosen: set[str]) -> list[Json]:
    """Return the rows of chosen prompts, in the order of the file."""
    offsets = sorted(
        offset for key, responses in rows.prompts.items() if key in chosen for offset in _choose_runs(responses)
    )
    found = rows_at(rows.path, offsets)
    for row in found:
        picture = rows.pictures.get(str(row.get("prompt_key")))
        if picture is not None and not row.get("image_png"):
            row["image_png"] = rows_at(rows.path, [picture])[0].get("image_png")
    return found


def _choose_runs(responses: Sequence[tuple[int, list[str]]]) -> list[int]:
    """Return the offsets of a few responses to one prompt, in turn one of each kind."""
    of_kinds = [[offset for offset, kinds in responses if kind in kinds] for kind in KINDS]
    in_turn = (offset for offsets in itertools.zip_longest(*of_kinds) for offset in offsets if offset is not None)
    return list(dict.fromkeys(in_turn))[:RUNS_SHOWN]


def _spread(values: Sequence[str], count: int) -> list[str]:
    """Return at most `count` values, ordered so that the first few are spread over all."""
    if not values:
        return []
    bits = (len(values) - 1).bit_length()
    # Counted with reversed bits (van der Corput), each place falls into one of the largest gaps so far.
    places = (int(f"{number:0{bits}b}"[::-1], 2) * len(values) >> bits for number in range(1 << bits))
    return [values[place] for place in itertools.islice(dict.fromkeys(places), count)]


def judge_words(row: Json) -> str:
    """Return the words of the judge on a row of a rollouts file; "" where nobody asked it."""
    judge = row.get("judge")
    if not isinstance(judge, dict):
        return ""
    decided = judge.get("verdict")
    verdict = "no verdict, counted as wrong" if decided is None else "right" if decided else "wrong"
    text = judge.get("text")
    return f"{judge.get('model', 'judge')}: {verdict}\n{text if isinstance(text, str) else json.dumps(text)}"
