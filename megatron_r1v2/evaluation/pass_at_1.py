"""Pass@1, Pass@k and maj@k over repeated sampled runs, format and hallucination rates; pure but for one JSON file."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table

from megatron_r1v2.evaluation.estimates import budgets, confidence_interval, majority_at_k, pass_at_k
from megatron_r1v2.resilience.files import write_file
from megatron_r1v2.rewards.claims import Claim, hallucination_counts

EVALUATION_SEED = 0
"""Of every evaluation, so that two of them see the same random numbers."""


@dataclass(frozen=True)
class Outcome:
    """One response, as far as an evaluation counts it.

    Example: prompt_key "aime-12", sample_index 0, correct True, answer "204", well_formed 1.0, tokens 3120.
    """

    prompt_key: str
    sample_index: int
    """The run that it belongs to."""
    correct: bool
    """By the rules, or by the judge where the rules could not tell."""
    answer: str | None
    """The content of its last box; None: it has none."""
    well_formed: float
    """The format score."""
    tokens: int | None
    """The stop token included; None: an endpoint did not say."""
    claims: tuple[Claim, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    """Of its prompt."""
    judged: bool = False
    """The judge was asked."""
    unclear: bool = False
    """The judge was asked and its answer has no verdict; counted as wrong."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """The further parts of its reward, such as functions of one's own; those that do not apply are left out."""


@dataclass(frozen=True)
class EvaluationResult:
    """The result of an evaluation; the fields of `evaluation-NAME.json`."""

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
    mean_response_tokens: float | None
    """The stop token included; None: an endpoint did not say."""
    num_prompts: int
    temperature: float
    top_p: float
    seed: int
    step: int
    """Optimizer steps that the evaluated weights have seen."""
    pass_at_1_interval: tuple[float, float] | None = None
    """95 % by the cluster bootstrap over prompts (`estimates.confidence_interval`); older files have none."""
    pass_at_k: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    """By k: the unbiased estimate, and the ends of its interval."""
    maj_at_k: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    """By k: how often the majority of k responses is right, and the ends of its interval."""
    model: str = ""
    """The evaluated folder, or an endpoint's model."""
    judged: int = 0
    """Responses that the judge was asked about."""
    judge_unclear: int = 0
    """Those of them without a verdict, counted as wrong."""
    finished: str = ""
    """When it ended, by UTC, in ISO 8601."""
    data: str = ""
    """Folder of the data set; older files have none."""
    available: int = 0
    """Prompts of the whole data set, or of the whole benchmark that it is a part of; older files have 0."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """By further part of the reward, such as functions of one's own: the mean over the responses that have it."""

    @property
    def size(self) -> str:
        """Return "n = 300", or "n = 100 of 900, partial"."""
        return size_text(self.num_prompts, self.available)


def size_text(num_prompts: int, available: int) -> str:
    """Return the number of prompts behind a figure, and whether they are a part of a benchmark only."""
    return f"n = {num_prompts}" + (f" of {available}, partial" if num_prompts < available else "")


@dataclass(frozen=True)
class Conditions:
    """The conditions of an evaluation, for the record.

    Example: temperature 0.6, top_p 0.95, seed 0, step 1200, model "runs/r1v2".
    """

    temperature: float
    top_p: float
    seed: int
    step: int
    """Optimizer steps that the weights have seen."""
    model: str = ""
    """A folder, or an endpoint's model."""
    data: str = ""
    """Folder of the data set."""
    available: int = 0
    """Prompts of the whole data set or benchmark; 0: not known."""


def evaluate_outcomes(
    name: str, keys: Sequence[str], outcomes: Sequence[Outcome], conditions: Conditions
) -> EvaluationResult:
    """Compute an evaluation; run i is every prompt's response with sample_index i.

    Args:
        name: "before", "after", ...
        keys: of the prompts, each once.
        outcomes: in any order, equally many for each prompt.

    Raises:
        ValueError: no prompts, a prompt twice, a response to another prompt, or a prompt without every run.
    """
    runs = _outcomes_by_run(keys, outcomes)
    # Sums of whole numbers before the one division: the order of the responses must not change a bit.
    pass_rates = tuple(sum(outcome.correct for outcome in run.values()) / len(run) for run in runs)
    prompts = [[run[key] for run in runs] for key in keys]
    counts = [sum(outcome.correct for outcome in responses) for responses in prompts]
    hallucination = hallucination_counts([o.claims for o in outcomes], [o.facts for o in outcomes])
    tokens = [outcome.tokens for outcome in outcomes if outcome.tokens is not None]
    ks = budgets(len(runs))
    return EvaluationResult(
        name=name,
        pass_at_1=statistics.fmean(pass_rates),
        pass_at_1_std=statistics.stdev(pass_rates) if len(pass_rates) > 1 else 0.0,
        runs=pass_rates,
        format_rate=statistics.fmean(outcome.well_formed for outcome in outcomes),
        hallucination_rate=hallucination.rate,
        claim_coverage=hallucination.coverage,
        mean_response_tokens=statistics.fmean(tokens) if tokens else None,
        num_prompts=len(keys),
        **dataclasses.asdict(conditions),
        pass_at_1_interval=confidence_interval([count / len(runs) for count in counts]),
        pass_at_k={str(k): _estimate([pass_at_k(len(runs), count, k) for count in counts]) for k in ks},
        maj_at_k={str(k): _estimate([_majority(responses, k) for responses in prompts]) for k in ks},
        judged=sum(outcome.judged for outcome in outcomes),
        judge_unclear=sum(outcome.unclear for outcome in outcomes),
        rewards=_mean_rewards(outcomes),
    )


def _mean_rewards(outcomes: Sequence[Outcome]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for outcome in outcomes:
        for part, value in outcome.rewards.items():
            values.setdefault(part, []).append(value)
    # fsum of fmean: the order of the responses must not change a bit.
    return {part: statistics.fmean(of_part) for part, of_part in values.items()}


def _estimate(values: Sequence[float]) -> tuple[float, float, float]:
    return (statistics.fmean(values), *confidence_interval(values))


def _majority(responses: Sequence[Outcome], k: int) -> float:
    """Return maj@k of one prompt: right answers, however written, are one answer; wrong ones are as many as texts."""
    # One vote for all right answers: otherwise "1/2" and "0.5" would lose to a wrong answer that is written one way.
    right = "right"
    votes = [
        None
        if outcome.answer is None or not outcome.answer.strip()
        else right
        if outcome.correct
        else f"wrong: {' '.join(outcome.answer.split()).casefold()}"
        for outcome in responses
    ]
    return majority_at_k(votes, frozenset([right]), k)


def _outcomes_by_run(keys: Sequence[str], outcomes: Sequence[Outcome]) -> list[dict[str, Outcome]]:
    """Group the responses by sample index, and check that every prompt is in every run exactly once."""
    if not keys or not outcomes:
        raise ValueError(
            f"an evaluation needs prompts and responses, got {len(keys)} and {len(outcomes)}; "
            "check evaluation.data and evaluation.runs"
        )
    known = set(keys)
    if len(known) != len(keys):
        raise ValueError(f"{len(keys)} evaluation prompts have only {len(known)} keys; each key may occur once")
    runs: list[dict[str, Outcome]] = [{} for _ in range(1 + max(outcome.sample_index for outcome in outcomes))]
    for outcome in outcomes:
        key, run = outcome.prompt_key, runs[outcome.sample_index]
        if key not in known:
            raise ValueError(f"a response answers {key!r}, which is not among the evaluation prompts")
        if key in run:
            raise ValueError(f"prompt {key!r} has two responses in run {outcome.sample_index}; one is accepted")
        run[key] = outcome
    for index, run in enumerate(runs):
        if missing := sorted(known - run.keys()):
            raise ValueError(f"prompts {missing[:3]} have no response in run {index} of {len(runs)}; each needs one")
    return runs


def evaluation_path(folder: Path, name: str) -> Path:
    """Return where the evaluation `name` of a run is kept.

    Args:
        name: letters, digits, "-" and "_".

    Raises:
        ValueError: the name cannot be part of a file name.
    """
    if not name or not all(character.isascii() and (character.isalnum() or character in "-_") for character in name):
        raise ValueError(f"an evaluation's name is part of a file name, got {name!r}; use letters, digits, - and _")
    return folder / f"evaluation-{name}.json"


def check_name(folder: Path, name: str, **conditions: object) -> None:
    """Check that an evaluation's name is good, and not that of the result of another one, which it would replace.

    Args:
        conditions: of the new evaluation, by their fields of `EvaluationResult`.

    Raises:
        ValueError: the name cannot be part of a file name, or a result of that name has other conditions.
    """
    path = evaluation_path(folder, name)
    if not path.is_file():
        return
    try:
        earlier = read_evaluation(path)
    except ValueError:
        return  # a broken result says itself that it has to be made again
    changed = [
        f"{field} was {old!r} and is {new!r}"
        for field, new in conditions.items()
        if (old := getattr(earlier, field)) not in (new, "")  # "": an older file does not say
    ]
    if changed:
        raise ValueError(
            f"{path} is the result of another evaluation: {', '.join(changed)}; give this one another --name, or move "
            "that file away"
        )


def write_evaluation(folder: Path, result: EvaluationResult) -> Path:
    """Write `evaluation-NAME.json`, and return its path.

    Args:
        folder: the run's output folder; made when it is not there.
    """
    path = evaluation_path(folder, result.name)
    result = dataclasses.replace(result, finished=datetime.now(UTC).isoformat(timespec="seconds"))
    write_file(path, json.dumps(dataclasses.asdict(result), indent=2, allow_nan=False) + "\n")
    return path


def read_evaluation(path: Path) -> EvaluationResult:
    """Read what `write_evaluation` wrote.

    Raises:
        ValueError: not JSON, a field that `EvaluationResult` does not know, or one without a default is missing.
    """
    try:
        # Files of older evaluations lack the fields with defaults; unknown fields are of a newer version.
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); run the evaluation again") from error
    known = {field.name for field in dataclasses.fields(EvaluationResult)}
    needed = {
        field.name
        for field in dataclasses.fields(EvaluationResult)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if not isinstance(fields, dict) or not needed <= fields.keys() <= known:
        got = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(f"{path} holds {got}, an evaluation has {sorted(known)}; run the evaluation again")
    for name in ("runs", "pass_at_1_interval"):
        if fields.get(name) is not None:
            fields[name] = tuple(fields[name])
    for name in ("pass_at_k", "maj_at_k"):
        fields[name] = {k: tuple(values) for k, values in fields.get(name, {}).items()}
    return EvaluationResult(**fields)


def comparison_table(results: Sequence[EvaluationResult]) -> Table:
    """Return a table with one column for each evaluation, as in `before | after`.

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
        "95 % interval": [_interval(r.pass_at_1_interval) for r in results],
        **{f"Pass@{k}": [_percent(r.pass_at_k[k][0]) for r in results] for k in _shared(results, "pass_at_k")},
        **{f"maj@{k}": [_percent(r.maj_at_k[k][0]) for r in results] for k in _shared(results, "maj_at_k")},
        "well-formed": [_percent(r.format_rate) for r in results],
        **{f"reward: {part}": [_percent(r.rewards.get(part)) for r in results] for part in reward_parts(results)},
        "hallucination rate": [_percent(r.hallucination_rate) for r in results],
        "claim coverage": [_percent(r.claim_coverage) for r in results],
        "response tokens": [
            "-" if r.mean_response_tokens is None else f"{r.mean_response_tokens:.1f}" for r in results
        ],
        "prompts x runs": [
            f"{r.num_prompts} x {len(r.runs)}" + (", partial" if r.num_prompts < r.available else "") for r in results
        ],
        "step": [str(r.step) for r in results],
    }
    for label, cells in rows.items():
        table.add_row(label, *cells)
    return table


def reward_parts(results: Sequence[EvaluationResult]) -> list[str]:
    """Return the further parts of the reward that any of some results has."""
    return list(dict.fromkeys(part for result in results for part in result.rewards))


def _interval(ends: tuple[float, float] | None) -> str:
    return "-" if ends is None else f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f} %"


def _shared(results: Sequence[EvaluationResult], name: str) -> list[str]:
    """Return the k that all results have; those of older files have none."""
    return [k for k in getattr(results[0], name) if all(k in getattr(result, name) for result in results)]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
