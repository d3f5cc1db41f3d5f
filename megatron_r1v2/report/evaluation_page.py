"""The results page: the paper's table beside ours, breakdowns, and responses to look through; one HTML file.

python -m megatron_r1v2 report --evaluations RUN_DIR [RUN_DIR ...] [--output PAGE.html]
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict

from megatron_r1v2.evaluation.pass_at_1 import EvaluationResult, reward_parts
from megatron_r1v2.report.evaluation_read import (
    BENCHMARK,
    KINDS,
    Evaluation,
    Group,
    judge_words,
    kinds_of,
    read_evaluations,
)
from megatron_r1v2.report.html import template, write_page
from megatron_r1v2.report.page import shown_response
from megatron_r1v2.report.read import Json

PAGE = "evaluation.html"


@dataclass(frozen=True)
class PaperRow:
    """A benchmark in table 1 of the R1V2 report (arXiv 2504.16656), which ours stands beside."""

    benchmark: str
    """As in a sample's `metadata.benchmark`, or as its own harness calls it."""
    score: float
    """Percent."""
    remark: str = ""


TABLE_1 = (
    PaperRow("AIME 2024", 78.9),
    PaperRow("LiveCodeBench", 63.6, "by its own harness"),
    PaperRow("LiveBench", 73.2, "by its own harness"),
    PaperRow("IFEval", 82.9, "by its own harness"),
    PaperRow("BFCL", 66.3, "by its own harness"),
    PaperRow("MMMU", 73.6, "validation"),
    PaperRow("MathVista", 74.0, "testmini"),
    PaperRow("OlympiadBench", 62.6),
    PaperRow("MathVision", 49.0, "testmini"),
    PaperRow("MMMU-Pro", 52.0),
)
# A field with more values (every question its own source, say) breaks nothing down.
_MAX_GROUPS = 60


def write_evaluation_page(folders: Sequence[Path | str], output: Path | str | None = None) -> Path:
    """Write one page of all evaluations in run folders.

    Args:
        output: the page; None: `evaluation.html` in the first folder.

    Raises:
        ValueError: a folder does not exist, or no evaluation is there.
    """
    notes: list[str] = []
    evaluations = read_evaluations(folders, notes)
    script = template("evaluation.js").render()
    prompts = _prompts(evaluations)
    page = template("evaluation.html").render(
        script=script,
        # The browser runs this script and no other, whatever the text of a response says.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        prompts=prompts,
        num_shown={kind: sum(prompt["counts"][kind] for prompt in prompts) for kind in ("all", *KINDS)},
        num_differ=sum(prompt["differs"] for prompt in prompts),
        folders=[str(folder) for folder in folders],
        paper=_paper_table(evaluations),
        results=[_result(evaluation) for evaluation in evaluations],
        any_claims=any(evaluation.result.claim_coverage is not None for evaluation in evaluations),
        any_judged=any(evaluation.result.judged for evaluation in evaluations),
        rewards=reward_parts([evaluation.result for evaluation in evaluations]),
        evaluations=[_shown(evaluation) for evaluation in evaluations],
        kinds=KINDS,
        notes=notes,
    )
    return write_page(Path(output) if output is not None else Path(folders[0]) / PAGE, page)


def _paper_table(evaluations: Sequence[Evaluation]) -> dict[str, object] | None:
    """Return the paper's table 1 with a column for each model of ours; None without an evaluation of one benchmark."""
    named = [evaluation for evaluation in evaluations if evaluation.benchmark]
    models = list(dict.fromkeys(_model(evaluation) for evaluation in named))
    if not models:
        return None
    rows = []
    for row in TABLE_1:
        ours = []
        for model in models:
            of_model = [e.result for e in named if _model(e) == model and e.benchmark == row.benchmark]
            ours.append([_score(result) for result in of_model])
        rows.append({"row": row, "ours": ours})
    known = {row.benchmark for row in TABLE_1}
    others = list(dict.fromkeys(e.benchmark for e in named if e.benchmark not in known))
    return {"models": models, "rows": rows, "others": others}


def _model(evaluation: Evaluation) -> str:
    result = evaluation.result
    name = result.model or str(evaluation.folder)
    return f"{name}, step {result.step}" if result.step else name


def _result(evaluation: Evaluation) -> dict[str, object]:
    result = evaluation.result
    return {
        "name": result.name,
        "benchmark": evaluation.benchmark,
        "model": _model(evaluation),
        "pass_at_1": _score(result),
        "pass_at_k": {k: _percent(values[0]) for k, values in result.pass_at_k.items()},
        "maj_at_k": {k: _percent(values[0]) for k, values in result.maj_at_k.items()},
        "format": _percent(result.format_rate),
        "rewards": {part: _percent(value) for part, value in result.rewards.items()},
        "hallucination": _percent(result.hallucination_rate),
        "coverage": _percent(result.claim_coverage),
        "tokens": "-" if result.mean_response_tokens is None else f"{result.mean_response_tokens:.0f}",
        "size": f"{result.size}, x {len(result.runs)}",
        "sampling": f"temperature {result.temperature:g}, top-p {result.top_p:g}, seed {result.seed}",
        "judged": result.judged,
        "unclear": result.judge_unclear,
    }


class _Score(NamedTuple):
    rate: str
    remark: str
    """The interval and the number of prompts, which may go to lines of their own where there is no room."""


def _score(result: EvaluationResult) -> _Score:
    rate = _percent(result.pass_at_1)
    if result.pass_at_1_interval is None:
        return _Score(f"{rate},", result.size)
    low, high = result.pass_at_1_interval
    return _Score(rate, f"({100 * low:.1f} to {100 * high:.1f}), {result.size}")


def _shown(evaluation: Evaluation) -> dict[str, object]:
    return {
        "name": evaluation.result.name,
        "size": evaluation.result.size,
        "breakdowns": [
            (name, sorted(values.items(), key=lambda item: item[0]))
            for name, values in evaluation.groups.items()
            if name != BENCHMARK and len(values) <= _MAX_GROUPS and not _is_of_all(values, evaluation)
        ],
        "counts": evaluation.counts,
        "total": evaluation.num_responses,
        "num_shown": len(evaluation.responses),
    }


def _is_of_all(values: Mapping[str, Group], evaluation: Evaluation) -> bool:
    """Return whether all responses have the same value: its score is that of the whole."""
    return len(values) == 1 and next(iter(values.values())).responses == evaluation.num_responses


class PromptView(TypedDict):
    """A prompt with its responses, of each evaluation that has it."""

    first: dict[str, object]
    """Its first response, which has the question and the picture too."""
    parts: list[dict[str, object]]
    """One for each evaluation."""
    counts: dict[str, int]
    """Responses shown: all, and of each kind."""
    differs: bool
    """One model is mostly right, another one is not."""


def _prompts(evaluations: Sequence[Evaluation]) -> list[PromptView]:
    """Return the prompts with responses to show, in the order of the files."""
    # Two data sets may use a key for different questions.
    by_prompt: dict[tuple[str, ...], dict[int, list[Json]]] = {}
    for number, evaluation in enumerate(evaluations):
        for row in evaluation.responses:
            prompt = tuple(str(row.get(name)) for name in ("prompt_key", "question", "answer"))
            by_prompt.setdefault(prompt, {}).setdefault(number, []).append(row)
    return [_prompt(of_prompt, evaluations) for of_prompt in by_prompt.values()]


def _prompt(of_prompt: Mapping[int, Sequence[Json]], evaluations: Sequence[Evaluation]) -> PromptView:
    parts: list[dict[str, object]] = []
    counts = dict.fromkeys(("all", *KINDS), 0)
    mostly_right = set()
    for number, rows in of_prompt.items():
        right, num_runs = evaluations[number].right_by_prompt[str(rows[0].get("prompt_key"))]
        mostly_right.add(2 * right > num_runs)
        for row in rows:
            for kind in ("all", *kinds_of(row)):
                counts[kind] += 1
        parts.append(
            {
                "name": evaluations[number].result.name,
                "model": _model(evaluations[number]),
                "right": f"{right} of {num_runs} right",
                "responses": [_response(row) for row in rows],
            }
        )
    first = _response(next(iter(of_prompt.values()))[0])
    return {"first": first, "parts": parts, "counts": counts, "differs": len(mostly_right) > 1}


def _response(row: Json) -> dict[str, object]:
    metadata = row.get("metadata")
    return {
        **shown_response(row),
        "kinds": kinds_of(row),
        "run": row.get("sample_index", 0),
        "judge": judge_words(row),
        "metadata": metadata if isinstance(metadata, dict) else {},
    }


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
