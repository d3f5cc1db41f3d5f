"""The decode time that is lost to waiting for the longest responses, by simulation of the engine's scheduling.

The lengths of responses are taken for log-normal, cut at the longest allowed. A replica begins as many responses as its
cache holds; a step of decode takes what the roofline says. A phase ends when the last response of the last replica has.
In segments, a response generates so many tokens a phase and goes on in the next one, beside new responses.
"""

from __future__ import annotations

import heapq
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean

from megatron_r1v2.models.architecture import R1V2Architecture
from megatron_r1v2.planning.hardware import Hardware
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.planning.roofline import DecodeCost, cache_tokens, decode_cost
from megatron_r1v2.planning.workload import Workload

REPLICAS = (1, 8, 64)
_SEED = 1
_WARM_UP_PHASES, _PHASES = 6, 6
# A replica that has finished so much of its responses still has others to keep it full.
_FULL_PART = 0.8
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Lengths:
    """The tokens of responses: log-normal, cut."""

    mean: float
    """After the cut."""
    cut: int
    spread: float
    """Standard deviation of the logarithm before the cut."""

    @property
    def location(self) -> float:
        """Return the mean of the logarithm before the cut."""
        low, high = math.log(self.mean) - 4 * self.spread**2 - 1, math.log(self.cut) + 10 * self.spread
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if cut_mean(middle, self.spread, self.cut) < self.mean else (low, middle)
        return low

    def clipped(self) -> float:
        """Return the part of the responses that is cut."""
        return 1 - _NORMAL.cdf((math.log(self.cut) - self.location) / self.spread)

    def draw(self, count: int, source: random.Random) -> list[int]:
        """Draw lengths."""
        location = self.location
        return [max(1, min(self.cut, round(source.lognormvariate(location, self.spread)))) for _ in range(count)]


def cut_mean(location: float, spread: float, cut: float) -> float:
    """Return the mean of a log-normal number that is cut from above."""
    border = (math.log(cut) - location) / spread
    below = math.exp(location + spread**2 / 2) * _NORMAL.cdf(border - spread)
    return below + cut * (1 - _NORMAL.cdf(border))


def read_lengths(metrics: Path, cut: int) -> Lengths:
    """Estimate mean and spread of the lengths from a run's metrics.jsonl.

    Args:
        metrics: the file, or the run's folder.
        cut: `generation.max_response_tokens`.

    Raises:
        ValueError: no step in the file has the lengths of its responses.
    """
    path = metrics / "metrics.jsonl" if metrics.is_dir() else metrics
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--lengths={metrics} cannot be read as a metrics.jsonl: {error}") from error
    steps = [row for row in rows if isinstance(row, Mapping) and "response_length/mean" in row]
    if not steps:
        raise ValueError(
            f"--lengths={metrics} has no response_length/mean in any line; give the metrics.jsonl of a grpo run"
        )
    mean = min(fmean(float(row["response_length/mean"]) for row in steps), cut - 1.0)
    clipped = fmean(float(row.get("response_length/clip_ratio", 0.0)) for row in steps)
    longest = min(fmean(float(row.get("response_length/max", cut)) for row in steps), cut)
    return Lengths(mean, cut, _spread(mean, cut, clipped=clipped, longest=longest))


def _spread(mean: float, cut: int, *, clipped: float, longest: float) -> float:
    """Find the spread whose part beyond a length is as observed."""
    # Where few are cut, the longest of some hundreds of responses stands where one in a few hundred does.
    border, beyond = (cut, clipped) if clipped > 0.005 else (max(longest, mean + 1), 0.003)
    low, high = 0.02, 3.0
    for _ in range(50):
        middle = (low + high) / 2
        at = (math.log(border) - Lengths(mean, cut, middle).location) / middle
        low, high = (middle, high) if 1 - _NORMAL.cdf(at) < beyond else (low, middle)
    return low


@dataclass(frozen=True)
class Replica:
    """The engine of a replica."""

    cost: DecodeCost
    max_requests: int
    cache_tokens: float
    prompt_tokens: int
    responses: int
    """Of a step, on this replica."""

    @classmethod
    def planned(cls, architecture: R1V2Architecture, layout: Layout, work: Workload, hardware: Hardware) -> Replica:
        """Return the engine of a workload."""
        return cls(
            cost=decode_cost(architecture, layout, work, hardware),
            max_requests=work.max_requests,
            cache_tokens=cache_tokens(architecture, layout, work),
            prompt_tokens=work.prompt_tokens,
            responses=max(1, work.responses_per_step // layout.data),
        )


@dataclass(frozen=True)
class Tail:
    """Decode of a phase with its tail."""

    replicas: int
    segment_tokens: int
    """0: whole responses."""
    seconds: float
    """Of a phase."""
    tokens: float
    """Generated in it, over all replicas."""
    lost: float
    """The part of the time that a phase takes longer than if all replicas were full to its end."""
    continued: float = 0.0
    """Tokens of earlier phases in front of its segments: they are computed again, over all replicas."""


def simulate_tails(replica: Replica, lengths: Lengths, *, segment_tokens: int) -> list[Tail]:
    """Simulate phases on 1, 8 and 64 replicas, each first with whole responses and then in segments."""
    return [
        simulate_tail(replica, lengths, replicas=count, segment_tokens=tokens)
        for count in REPLICAS
        for tokens in (0, segment_tokens)
    ]


def simulate_tail(replica: Replica, lengths: Lengths, *, replicas: int, segment_tokens: int = 0) -> Tail:
    """Simulate a phase, in segments one of many.

    Args:
        segment_tokens: a response generates so many a phase; 0: all of them.
    """
    source = random.Random(_SEED)
    drawn = [lengths.draw(replica.responses, source) for _ in range(replicas)]
    whole = [_run(replica, [(0, length) for length in each]) for each in drawn]
    full_rate = sum(tokens / seconds for _, _, tokens, seconds in whole)
    if not segment_tokens:
        seconds, tokens = max(each[0] for each in whole), float(sum(each[1] for each in whole))
        return Tail(replicas, 0, seconds, tokens, max(0.0, 1 - tokens / full_rate / seconds))
    carried = [[(0, length) for length in each] for each in drawn]
    total = [0.0, 0.0, 0.0]
    for phase in range(_WARM_UP_PHASES + _PHASES):
        parts = [[(start, min(length, start + segment_tokens)) for start, length in each] for each in carried]
        ran = [_run(replica, each) for each in parts]
        if phase >= _WARM_UP_PHASES:
            total[0] += max(each[0] for each in ran)
            total[1] += sum(each[1] for each in ran)
            total[2] += sum(start for each in parts for start, _ in each)
        for index, each in enumerate(carried):
            going_on = [(start + segment_tokens, length) for start, length in each if length > start + segment_tokens]
            new = lengths.draw(replica.responses - len(going_on), source)
            carried[index] = going_on + [(0, length) for length in new]
    seconds, tokens, continued = (each / _PHASES for each in total)
    return Tail(replicas, segment_tokens, seconds, tokens, max(0.0, 1 - tokens / full_rate / seconds), continued)


def _run(replica: Replica, responses: Sequence[tuple[int, int]]) -> tuple[float, int, int, float]:
    """Decode responses on a replica, in order of arrival, each from its first to its last token.

    Returns:
        Seconds and tokens; and tokens and seconds of the part in which it was full.
    """
    queue, active = list(reversed(responses)), list[tuple[int, int]]()
    seconds, now, tokens, reserved, cached, ended = 0.0, 0, 0, 0, 0, 0
    full = (0, 0.0)
    while queue or active:
        while queue and len(active) < replica.max_requests:
            start, end = queue[-1]
            if active and reserved + replica.prompt_tokens + end > replica.cache_tokens:
                break
            queue.pop()
            heapq.heappush(active, (now + end - start, end))
            reserved += replica.prompt_tokens + end
            cached += replica.prompt_tokens + start
        steps = active[0][0] - now
        average = cached + len(active) * steps / 2
        seconds += steps * replica.cost.step_seconds(len(active), average)
        tokens, cached, now = tokens + steps * len(active), cached + steps * len(active), now + steps
        while active and active[0][0] == now:
            end = heapq.heappop(active)[1]
            reserved -= replica.prompt_tokens + end
            cached -= replica.prompt_tokens + end
            ended += 1
        if not full[0] and ended >= _FULL_PART * len(responses):
            full = (tokens, seconds)
    return seconds, tokens, *full
