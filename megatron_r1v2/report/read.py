"""The contents of a run folder, read with patience: files may be missing, the last line may be half written."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TypeGuard

import yaml

from megatron_r1v2.monitoring.recorder import STARTS_FILE

STEPS_SHOWN = 6
ROLLOUTS_PER_STEP = 4
PAIRS_SHOWN = 10
REWARD = "reward/"
"""Begins the key of a part of the reward in an evaluation."""

Json = dict[str, object]


@dataclass(frozen=True)
class Pair:
    """The responses to one prompt before and after training."""

    before: Json
    after: Json

    @property
    def change(self) -> str:
        """Return "turned right", "turned wrong", "stayed right" or "stayed wrong"."""
        right_before, right_after = bool(self.before.get("correct")), bool(self.after.get("correct"))
        verb = "stayed" if right_before == right_after else "turned"
        return f"{verb} {'right' if right_after else 'wrong'}"


CHANGES = ("turned right", "turned wrong", "stayed wrong", "stayed right")


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of a run, the earlier one first."""

    first: str
    last: str
    """Their names."""
    changes: Mapping[str, int] = field(default_factory=dict)
    """Of all prompts that are in both: how many made each change."""
    pairs: Sequence[Pair] = ()
    """A few of them."""


@dataclass
class Run:
    """The contents of a run folder that the report shows."""

    path: Path
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    """Step -> metric -> value, ordered by step; of a step done twice (after a restart) the last counts."""
    evaluations: list[Json] = field(default_factory=list)
    """In the order in which they were made."""
    comparison: Comparison | None = None
    rollouts: dict[int, list[Json]] = field(default_factory=dict)
    """A few steps -> a few rollouts of each."""
    changes: dict[int, list[str]] = field(default_factory=dict)
    """Steps done -> settings that were other ones from there on."""
    starts: list[Json] = field(default_factory=list)
    """The lines of starts.jsonl."""
    settings: str = ""
    """The recipe as YAML, where the run saved one."""
    recipe: Mapping[str, object] = field(default_factory=dict)
    """Its settings by dotted name, where it can be read."""
    notes: list[str] = field(default_factory=list)
    """Lines on missing and damaged files, for the reader of the report."""

    @property
    def name(self) -> str:
        """Return the name that the recipe gives, or that of the folder."""
        return str(self.recipe.get("run.name") or self.path.resolve().name)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps that have a metric, and its values."""
        steps = [step for step, values in self.metrics.items() if name in values]
        return steps, [self.metrics[step][name] for step in steps]


def read_run(path: Path | str, compare: tuple[str, str] | None = None) -> Run:
    """Return the contents of a run folder; missing and damaged files are in its notes.

    Args:
        compare: names of the evaluations to compare; None: the last one, and the first of the same prompts.

    Raises:
        ValueError: the folder does not exist, or has no evaluation of a name in `compare`.
    """
    run = Run(Path(path))
    if not run.path.is_dir():
        raise ValueError(f"run folder {str(path)!r} does not exist; give a folder that a training run has written")
    _read_metrics(run)
    _read_rollouts(run)
    _read_evaluations(run)
    run.comparison = _compare(run, compare)
    if (run.path / STARTS_FILE).is_file():
        run.starts = [row for _, row in each_line(run.path / STARTS_FILE, run.notes)]
    recipe = run.path / "recipe.yaml"
    run.settings = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else ""
    run.recipe = _settings(run)
    return run


def _settings(run: Run) -> dict[str, object]:
    """Return the settings of the saved recipe by dotted name; an empty dictionary where it cannot be read."""
    try:
        loaded = yaml.safe_load(run.settings)
    except yaml.YAMLError:
        run.notes.append("recipe.yaml is not valid YAML; it is shown as it stands.")
        return {}
    sections = loaded.items() if isinstance(loaded, dict) else ()
    return {f"{s}.{key}": value for s, keys in sections if isinstance(keys, dict) for key, value in keys.items()}


def _read_metrics(run: Run) -> None:
    path = run.path / "metrics.jsonl"
    if not path.is_file():
        # Shards are a data set, such as that of `r1v2 pairs`, and have no curves.
        if not any(run.path.glob("*.tar")):
            run.notes.append("There is no metrics.jsonl yet, so no curves are shown.")
        return
    found: dict[int, dict[str, float]] = {}
    for _, row in each_line(path, run.notes):
        numbers = {name: float(value) for name, value in row.items() if _is_number(value)}
        step = numbers.pop("step", math.nan)
        if math.isfinite(step):
            found.setdefault(int(step), {}).update(numbers)
        changed = row.get("settings_changed")
        if math.isfinite(step) and isinstance(changed, list):
            run.changes.setdefault(int(step), []).extend(map(str, changed))
    run.metrics = dict(sorted(found.items()))


def _read_rollouts(run: Run) -> None:
    path = run.path / "rollouts.jsonl"
    if not path.is_file():
        return
    by_step: dict[int, list[_Candidate]] = {}
    for offset, row in each_line(path, run.notes):
        step = row.get("step")
        if _is_number(step):
            advantage = _number(row.get("advantage"), 0.0)
            advantage = abs(advantage) if math.isfinite(advantage) else 0.0
            by_step.setdefault(int(step), []).append(_Candidate(bool(row.get("correct")), advantage, offset))
    for step in _spread(sorted(by_step), STEPS_SHOWN):
        rows = {json.dumps(row, sort_keys=True): row for row in rows_at(path, _mixed(by_step[step]))}
        run.rollouts[step] = list(rows.values())


@dataclass(frozen=True)
class _Candidate:
    """A rollout that may be shown."""

    correct: bool
    advantage: float
    """|advantage|, which says how much was learned from it."""
    offset: int
    """Of its line, in bytes."""


def _mixed(candidates: Sequence[_Candidate]) -> list[int]:
    """Return the offsets of a few rollouts, wrong and right ones where there are both, the largest advantage first."""
    # Sorting is stable: of equal ones the first in the file.
    ordered = sorted(candidates, key=lambda each: -each.advantage)
    wrong = [each for each in ordered if not each.correct]
    right = [each for each in ordered if each.correct]
    half = ROLLOUTS_PER_STEP // 2
    chosen = wrong[: max(half, ROLLOUTS_PER_STEP - len(right))]
    chosen += right[: ROLLOUTS_PER_STEP - len(chosen)]
    return [each.offset for each in sorted(chosen, key=lambda each: (-each.advantage, each.offset))]


def _read_evaluations(run: Run) -> None:
    for path in sorted(run.path.glob("evaluation-*.json")):
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            run.notes.append(f"{path.name} is not readable and was left out.")
            continue
        if isinstance(loaded, dict):
            rewards = loaded.pop("rewards", None)
            parts = {f"{REWARD}{part}": value for part, value in rewards.items()} if isinstance(rewards, dict) else {}
            run.evaluations.append({"name": path.stem.removeprefix("evaluation-"), **loaded, **parts})
    run.evaluations.sort(key=lambda row: (_finished(run, row), _number(row.get("step"), 0.0), str(row["name"])))


def _finished(run: Run, evaluation: Json) -> float:
    """Return when an evaluation ended, in seconds: as it says, or by its file."""
    try:
        return datetime.fromisoformat(str(evaluation.get("finished"))).timestamp()
    except ValueError:
        return (run.path / f"evaluation-{evaluation['name']}.json").stat().st_mtime


def _compare(run: Run, names: tuple[str, str] | None) -> Comparison | None:
    """Compare two evaluations of a run; None: it has not two."""
    known = [str(row["name"]) for row in run.evaluations]
    for name in names or ():
        if name not in known:
            raise ValueError(
                f"{run.path} has no evaluation {name!r}; it has {', '.join(known) or 'none'}: name two of them"
            )
    if names is None and len(known) < 2:
        return None
    responses = {name: run.path / f"evaluation-{name}.rollouts.jsonl" for name in names or known}
    prompts = {name: _first_by_prompt(path, run.notes) for name, path in responses.items() if path.is_file()}
    first, last = names or (known[0], known[-1])
    if names is None:
        alike = (name for name in known[:-1] if prompts.get(name, {}).keys() & prompts.get(last, {}).keys())
        found = next(alike, None)
        if found is None and _data_sets_differ(run.evaluations, first, last):
            return None
        first = found or first
    if first not in prompts or last not in prompts:
        return Comparison(first, last)
    return _pair_up(Comparison(first, last), responses, prompts)


def _data_sets_differ(evaluations: Sequence[Json], *names: str) -> bool:
    """Return whether evaluations say that they are of different data sets, such as two benchmarks."""
    data = {str(row["data"]) for row in evaluations if row["name"] in names and row.get("data")}
    return len(data) > 1


def _pair_up(
    compared: Comparison, responses: Mapping[str, Path], prompts: Mapping[str, Mapping[str, tuple[bool, int]]]
) -> Comparison:
    """Return the comparison with its changes, and a few prompts of each."""
    first, last = prompts[compared.first], prompts[compared.last]
    by_change: dict[str, list[str]] = {change: [] for change in CHANGES}
    for key in first:
        if key in last:
            by_change[Pair({"correct": first[key][0]}, {"correct": last[key][0]}).change].append(key)
    changes = {change: len(keys) for change, keys in by_change.items()}
    # In turn from each kind, so that no kind is hidden.
    in_turn = [key for keys in itertools.zip_longest(*by_change.values()) for key in keys if key is not None]
    chosen = in_turn[:PAIRS_SHOWN]
    before = rows_at(responses[compared.first], [first[key][1] for key in chosen])
    after = rows_at(responses[compared.last], [last[key][1] for key in chosen])
    pairs = sorted(map(Pair, before, after), key=lambda pair: CHANGES.index(pair.change))
    return replace(compared, changes=changes if chosen else {}, pairs=pairs)


def _first_by_prompt(path: Path, notes: list[str]) -> dict[str, tuple[bool, int]]:
    found: dict[str, tuple[bool, int]] = {}
    for offset, row in each_line(path, notes):
        found.setdefault(str(row.get("prompt_key")), (bool(row.get("correct")), offset))
    return found


def each_line(path: Path, notes: list[str]) -> Iterator[tuple[int, Json]]:
    """Yield (byte offset, object) of each line; a half-written last line is expected, a damaged one is noted."""
    damaged, offset = 0, 0
    with path.open("rb") as file:
        for raw in file:
            row = _parse(raw)
            if row is not None:
                yield offset, row
            elif raw.endswith(b"\n") and raw.strip():
                damaged += 1
            offset += len(raw)
    if damaged:
        notes.append(f"{path.name}: {damaged} damaged line{'s were' if damaged > 1 else ' was'} left out.")


def rows_at(path: Path, offsets: Sequence[int]) -> list[Json]:
    """Return the objects of the lines that begin at byte offsets, from `each_line`."""
    rows: list[Json] = []
    with path.open("rb") as file:
        for offset in offsets:
            file.seek(offset)
            rows.append(_parse(file.readline()) or {})
    return rows


def _parse(raw: bytes) -> Json | None:
    try:
        row = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _spread(values: Sequence[int], count: int) -> list[int]:
    """Return at most `count` values, evenly spread, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: object, default: float) -> float:
    return float(value) if _is_number(value) else default


def mean_of(values: Mapping[int, Mapping[str, float]], name: str, part: slice) -> float | None:
    """Return the mean of a metric over a part of the steps that have it, or None where none has."""
    found = [row[name] for row in values.values() if name in row and math.isfinite(row[name])]
    chosen = found[part]
    return sum(chosen) / len(chosen) if chosen else None
