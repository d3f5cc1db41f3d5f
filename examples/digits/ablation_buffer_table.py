"""The table of `ablation_buffer.py`: responses to a target Pass@1 with 95 % t-intervals over seeds, paired differences.

Validation is of a few hundred responses and noisy, so a curve is the mean of three validations in a row. A run that
does not reach the target counts as having reached it with its last response, which is said: its true cost is higher.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import t as student_t

from examples.digits.ablation_tables import cost_to_reach, learning_curve, read_rollout_steps
from megatron_r1v2.resilience.files import write_file

TARGET = 0.95
"""Validation Pass@1: on the tuning seed the default reaches it after two thirds of its responses, which leaves room for
slower arms; the start is at 0.84."""
CONFIDENCE = 0.95
_SMOOTHED = 3


@dataclass(frozen=True)
class ArmRuns:
    """The finished runs of an arm."""

    label: str
    rate: float
    """The learning rate that was best on the tuning seed."""
    runs: Mapping[int, Path]
    """By seed."""
    reference: str
    """Name of the arm that it is compared with."""


@dataclass(frozen=True)
class Outcome:
    """The numbers of one run."""

    responses: float
    """Generated."""
    to_target: float
    """Responses to the target; all of them where it was not reached."""
    reached: bool
    late: float
    """Mean validation Pass@1 over the second half."""
    fresh: float
    """Mean fraction of effective responses among the generated ones."""
    trained: float
    """The same among those trained on."""


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided interval by Student's t; infinite for a single value."""

    mean: float
    half_width: float

    @property
    def excludes_zero(self) -> bool:
        """Return whether the whole interval is on one side of zero."""
        return abs(self.mean) > self.half_width

    def text(self, scale: float = 1.0, digits: int = 0) -> str:
        """Return "mean (low to high)"."""
        mean, half = self.mean * scale, self.half_width * scale
        if math.isinf(half):
            return f"{mean:,.{digits}f}"
        return f"{mean:,.{digits}f} ({mean - half:,.{digits}f} to {mean + half:,.{digits}f})"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of values with its 95 % interval."""
    if len(values) < 2:
        return Interval(statistics.fmean(values), math.inf)
    quantile = float(student_t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1))
    return Interval(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values)))


def smooth(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return a learning curve whose values are means of three in a row, at the cost of the last of them."""
    return [
        (curve[end][0], statistics.fmean(value for _, value in curve[end - _SMOOTHED + 1 : end + 1]))
        for end in range(_SMOOTHED - 1, len(curve))
    ]


def late_pass_at_1(run: Path) -> float:
    """Return the mean validation Pass@1 over the second half of a run, by which learning rates are chosen.

    Raises:
        FileNotFoundError: the run has not validated yet.
    """
    values = [value for _, value in learning_curve(read_rollout_steps(run), "rollout/responses")]
    if not values:
        raise FileNotFoundError(f"{run} has no validation yet")
    return statistics.fmean(values[len(values) // 2 :])


def outcome(run: Path) -> Outcome:
    """Return the numbers of a finished run."""
    steps = read_rollout_steps(run)
    curve = learning_curve(steps, "rollout/responses")
    total = sum(step["rollout/responses"] for step in steps)
    cost = cost_to_reach(smooth(curve), TARGET)
    return Outcome(
        responses=total,
        to_target=total if cost is None else cost,
        reached=cost is not None,
        late=late_pass_at_1(run),
        fresh=statistics.fmean(step["ssb/fresh_effective_fraction"] for step in steps),
        trained=statistics.fmean(step["ssb/trained_effective_fraction"] for step in steps),
    )


def paired(own: Mapping[int, Outcome], reference: Mapping[int, Outcome], name: str) -> Interval | None:
    """Return the mean difference of a number over the seeds that both arms have; None below two."""
    seeds = sorted(own.keys() & reference.keys())
    if len(seeds) < 2:
        return None
    return interval([getattr(own[seed], name) - getattr(reference[seed], name) for seed in seeds])


def write_table(root: Path, arms: Mapping[str, ArmRuns]) -> str:
    """Write table-buffer.md and table-buffer.json, the numbers of every run, and return the former."""
    outcomes = {name: {seed: outcome(run) for seed, run in arm.runs.items()} for name, arm in arms.items()}
    lines = [
        f"Responses to a validation Pass@1 of {TARGET:.0%}; in brackets 95 % intervals by Student's t over seeds, of",
        "differences paired by seed. < 0 responses, > 0 points: better than the arm it is compared with.",
        "",
        "| arm | rate | seeds | effective, fresh / trained on | responses | responses to target | reached |"
        " Pass@1, second half | compared with | responses | points |",
        "| --- |" + " --- |" * 10,
    ]
    for name, arm in arms.items():
        found = outcomes[name]
        if not found:
            continue
        cells = [arm.label, f"{arm.rate:g}", str(len(found)), *_own_cells(list(found.values()))]
        compared = arms.get(arm.reference)
        if compared is None or arm.reference == name:
            cells += ["", "", ""]
        else:
            others = outcomes[arm.reference]
            costs, late = (paired(found, others, field) for field in ("to_target", "late"))
            cells += [compared.label, _difference(costs), _difference(late, scale=100, digits=1)]
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    content = {
        "target": TARGET,
        "arms": {
            name: {"label": arm.label, "rate": arm.rate, "runs": {s: vars(o) for s, o in outcomes[name].items()}}
            for name, arm in arms.items()
        },
    }
    write_file(root / "table-buffer.md", text)
    write_file(root / "table-buffer.json", json.dumps(content, indent=1) + "\n")
    return text


def _own_cells(found: Sequence[Outcome]) -> list[str]:
    fresh, trained = (statistics.fmean(getattr(each, name) for each in found) for name in ("fresh", "trained"))
    return [
        f"{100 * fresh:.0f} / {100 * trained:.0f} %",
        f"{statistics.fmean(each.responses for each in found):,.0f}",
        interval([each.to_target for each in found]).text(),
        f"{sum(each.reached for each in found)} of {len(found)}",
        f"{interval([each.late for each in found]).text(100, 1)} %",
    ]


def _difference(found: Interval | None, *, scale: float = 1.0, digits: int = 0) -> str:
    if found is None:
        return "-"
    text = found.text(scale, digits)
    return f"**{text}**" if found.excludes_zero else text
