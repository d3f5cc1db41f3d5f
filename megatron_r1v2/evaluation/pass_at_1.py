"""Pass@1 over repeated sampled runs, with format and hallucination rates; pure but for one JSON file."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_r1v2.rewards.score import count_hallucinations
from megatron_r1v2.types import Prompt, ScoredRollout


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found; the fields of `evaluation-NAME.json`."""

    name: str
    """"before", "after", ...: part of the file's name."""
    pass_at_1: float
    """Mean over the runs of the fraction of right answers."""
    pass_at_1_std: float
    """Sample standard deviation (n - 1) over the runs; 0 for a single run."""
    runs: tuple[float, ...]
    """The fraction of right answers in each run."""
    format_rate: float
    """Mean format score."""
    hallucination_rate: float | None
    """Contradicted claims over claims; None when no claim was made."""
    claim_coverage: float | None
    """Responses with claims over responses to prompts with facts; None when no prompt has facts."""
    mean_response_tokens: float
    """The stop token included."""
    num_prompts: int
    temperature: float
    top_p: float
    seed: int
    step: int
    """Optimizer steps that the evaluated weights have seen."""


def evaluate_runs(
    name: str,
    prompts: Sequence[Prompt],
    scored: Sequence[ScoredRollout],
    *,
    temperature: float,
    top_p: float,
    seed: int,
    step: int,
) -> EvaluationResult:
    """Compute an evaluation from scored responses; run i is every prompt's response with sample_index i.

    Args:
        name: "before", "after", ...
        prompts: the prompts, each once.
        scored: the responses in any order, equally many for each prompt.
        temperature: of the sampling, for the record.
        top_p: of the sampling, for the record.
        seed: of the sampling, for the record.
        step: optimizer steps that the weights have seen.

    Raises:
        ValueError: no prompts, a prompt twice, a response to another prompt, or a prompt without every run.
    """
    by_key = {prompt.key: prompt for prompt in prompts}
    runs = _responses_by_run(by_key, len(prompts), scored)
    # Sums of whole numbers before the one division: the order of the responses must not change a bit.
    pass_rates = tuple(sum(response.rule_correct for response in run) / len(run) for run in runs)
    hallucination = count_hallucinations(scored, by_key)
    return EvaluationResult(
        name=name,
        pass_at_1=statistics.fmean(pass_rates),
        pass_at_1_std=statistics.stdev(pass_rates) if len(pass_rates) > 1 else 0.0,
        runs=pass_rates,
        format_rate=statistics.fmean(response.rewards["format"] for response in scored),
        hallucination_rate=hallucination.rate,
        claim_coverage=hallucination.coverage,
        mean_response_tokens=statistics.fmean(len(response.rollout.token_ids) for response in scored),
        num_prompts=len(prompts),
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        step=step,
    )


def _responses_by_run(
    prompts: Mapping[str, Prompt], num_prompts: int, scored: Sequence[ScoredRollout]
) -> list[list[ScoredRollout]]:
    """Group the responses by sample index, and check that every prompt is in every run exactly once."""
    if not num_prompts or not scored:
        raise ValueError(
            f"an evaluation needs prompts and responses, got {num_prompts} and {len(scored)}; "
            "check evaluation.data and evaluation.runs"
        )
    if len(prompts) != num_prompts:
        raise ValueError(f"{num_prompts} evaluation prompts have only {len(prompts)} keys; each key may occur once")
    num_runs = 1 + max(response.rollout.sample_index for response in scored)
    runs: list[dict[str, ScoredRollout]] = [{} for _ in range(num_runs)]
    for response in scored:
        key, run = response.rollout.prompt_key, runs[response.rollout.sample_index]
        if key not in prompts:
            raise ValueError(f"a response answers {key!r}, which is not among the evaluation prompts")
        if key in run:
            raise ValueError(
                f"prompt {key!r} has two responses in run {response.rollout.sample_index}; one is accepted"
            )
        run[key] = response
    for index, run in enumerate(runs):
        if missing := sorted(prompts.keys() - run.keys()):
            raise ValueError(f"prompts {missing[:3]} have no response in run {index} of {num_runs}; each needs one")
    return [list(run.values()) for run in runs]


def evaluation_path(folder: Path, name: str) -> Path:
    """Return where the evaluation `name` of a run is kept.

    Args:
        folder: the run's output folder.
        name: letters, digits, "-" and "_".

    Raises:
        ValueError: the name cannot be part of a file name.
    """
    if not name or not all(character.isascii() and (character.isalnum() or character in "-_") for character in name):
        raise ValueError(f"an evaluation's name is part of a file name, got {name!r}; use letters, digits, - and _")
    return folder / f"evaluation-{name}.json"


def write_evaluation(folder: Path, result: EvaluationResult) -> Path:
    """Write `evaluation-NAME.json` beside its place and rename it, and return its path.

    Args:
        folder: the run's output folder; made when it is not there.
        result: what to write.
    """
    path = evaluation_path(folder, result.name)
    folder.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json.part")
    beside.write_text(json.dumps(dataclasses.asdict(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(beside, path)
    return path


def read_evaluation(path: Path) -> EvaluationResult:
    """Read what `write_evaluation` wrote.

    Args:
        path: an `evaluation-NAME.json`.

    Raises:
        ValueError: not JSON, or not with exactly the fields of `EvaluationResult`.
    """
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); run the evaluation again") from error
    expected = {field.name for field in dataclasses.fields(EvaluationResult)}
    if not isinstance(fields, dict) or fields.keys() != expected:
        got = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(f"{path} holds {got}, an evaluation has {sorted(expected)}; run the evaluation again")
    return EvaluationResult(**{**fields, "runs": tuple(fields["runs"])})


def comparison_table(results: Sequence[EvaluationResult]) -> Table:
    """Return a table with one column for each evaluation, as in `before | after`.

    Args:
        results: evaluations of the same prompts, seeds and temperature.

    Raises:
        ValueError: they differ in prompts, runs, seed, temperature or top-p, so comparing them means nothing.
    """
    settings = {(r.num_prompts, len(r.runs), r.seed, r.temperature, r.top_p) for r in results}
    if len(settings) > 1:
        raise ValueError(
            f"evaluations {[r.name for r in results]} differ in (num_prompts, runs, seed, temperature, top_p): "
            f"{sorted(settings)}; evaluate again with equal settings"
        )
    table = Table(title="Held-out evaluation")
    table.add_column("")
    for result in results:
        table.add_column(result.name, justify="right")
    rows = {
        "Pass@1": [f"{_percent(r.pass_at_1)} +- {_percent(r.pass_at_1_std)}" for r in results],
        "well-formed": [_percent(r.format_rate) for r in results],
        "hallucination rate": [_percent(r.hallucination_rate) for r in results],
        "claim coverage": [_percent(r.claim_coverage) for r in results],
        "response tokens": [f"{r.mean_response_tokens:.1f}" for r in results],
        "prompts x runs": [f"{r.num_prompts} x {len(r.runs)}" for r in results],
        "step": [str(r.step) for r in results],
    }
    for label, cells in rows.items():
        table.add_row(label, *cells)
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
