"""The decode time that is lost to waiting for the longest responses, by simulation of the engine's scheduling.

The lengths of responses are taken for log-normal, cut at the longest allowed; a step of decode takes what the roofline
says. Replicas take prompts from a shared queue, each with all of its responses, as they have room. The responses to a
prompt share its tokens in the cache. A phase ends when the last response of the last replica has. In segments, a
response generates so many tokens a phase and goes on in the next one, on its replica and before new prompts, of which
each phase has as many.
"""

from __future__ import annotations

import heapq
import json
import math
import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist, fmean

from megatron_r1v2.models.architecture import R1V2Architecture
from megatron_r1v2.planning.hardware import Hardware
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.planning.roofline import DecodeCost, cache_tokens, decode_cost
from megatron_r1v2.planning.workload import Workload

REPLICAS = (1, 8, 64)
_SEED = 1
_WARM_UP_PHASES, _PHASES = 16, 2
# A replica that has finished so much of its responses still has others to keep it full.
_FULL_PART = 0.8
_NORMAL = NormalDist()

_Group = list[tuple[int, int]]
"""The responses to a prompt that have not ended: the tokens that each has, and its length."""


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
    responses_per_prompt: int = 1

    @classmethod
    def planned(cls, architecture: R1V2Architecture, layout: Layout, work: Workload, hardware: Hardware) -> Replica:
        """Return the engine of a workload."""
        return cls(
            cost=decode_cost(architecture, layout, work, hardware),
            max_requests=work.max_requests,
            cache_tokens=cache_tokens(architecture, layout, work),
            prompt_tokens=work.prompt_tokens,
            responses=max(1, work.responses_per_step // layout.data),
            responses_per_prompt=work.responses_per_prompt,
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
    """Tokens of earlier phases that are computed again, prompts included, over all replicas."""


def simulate_tails(replica: Replica, lengths: Lengths, *, segment_tokens: int) -> list[Tail]:
    """Simulate phases on 1, 8 and 64 replicas, each first with whole responses and then in segments."""
    return [
        simulate_tail(replica, lengths, replicas=count, segment_tokens=tokens)
        for count in REPLICAS
        for tokens in (0, segment_tokens)
    ]


def simulate_tail(replica: Replica, lengths: Lengths, *, replicas: int, segment_tokens: int = 0) -> Tail:
    """Simulate a phase, in segments the average of many.

    Args:
        segment_tokens: a response generates so many a phase; 0: all of them.
    """
    source = random.Random(_SEED)
    going_on: list[list[_Group]] = [[] for _ in range(replicas)]
    segment = segment_tokens or lengths.cut
    # After as many phases as the longest response has segments, each phase has as many responses as the next.
    warm_up, phases = (min(_WARM_UP_PHASES, lengths.cut // segment), _PHASES) if segment_tokens else (0, 1)
    seconds = tokens = full = again = 0.0
    for phase in range(warm_up + phases):
        drawn = [(0, length) for _ in range(replicas) for length in lengths.draw(replica.responses, source)]
        size = replica.responses_per_prompt
        new = [drawn[first : first + size] for first in range(0, len(drawn), size)]
        if phase < warm_up:
            # Who goes on depends on lengths alone, so the clock need not run yet.
            dealt = [[*own, *new[index::replicas]] for index, own in enumerate(going_on)]
            going_on = [[rest for group in groups if (rest := _rest(group, segment))] for groups in dealt]
            continue
        engines = _run_phase(replica, going_on, new, segment)
        last = max(engine.seconds for engine in engines)
        seconds, full = seconds + last, full + last * sum(engine.full_rate for engine in engines)
        tokens += sum(engine.tokens for engine in engines)
        again += sum(engine.continued for engine in engines)
        going_on = [engine.going_on for engine in engines]
    lost = max(0.0, 1 - tokens / full)
    return Tail(replicas, segment_tokens, seconds / phases, tokens / phases, lost, again / phases)


def _rest(group: _Group, segment_tokens: int) -> _Group:
    """Return the responses of a group that go on in the next phase."""
    return [(start + segment_tokens, length) for start, length in group if length > start + segment_tokens]


def _run_phase(
    replica: Replica, going_on: Sequence[Sequence[_Group]], new: Sequence[_Group], segment_tokens: int
) -> list[_Engine]:
    """Run a phase on all replicas: each first its own groups, then the next one of a queue when it has room."""
    queue, fair_share = deque(new), -(-len(new) // len(going_on))
    engines = []
    for own in going_on:
        limit = min(replica.max_requests, (fair_share + len(own)) * replica.responses_per_prompt)
        engines.append(_Engine(replica, limit, segment_tokens, deque(own)))
    # By time; at the same time each takes one group in turn.
    turns = [(0.0, 0, index) for index in range(len(engines))]
    while turns:
        seconds, turn, index = heapq.heappop(turns)
        engine = engines[index]
        if engine.has_room and (engine.own or queue):
            engine.begin((engine.own or queue).popleft())
            heapq.heappush(turns, (seconds, turn + 1, index))
        elif engine.waiting or engine.running:
            engine.advance()
            heapq.heappush(turns, (engine.seconds, 0, index))
    return engines


@dataclass(eq=False, slots=True)
class _Response:
    """A response in a phase."""

    number: int
    """In the order of arrival."""
    group: int
    start: int
    """The tokens that it has when it begins to run."""
    end: int
    """The tokens that it has after the phase."""
    last: int = 0
    """The step with the last of them, while it runs."""


@dataclass(eq=False, slots=True)
class _Engine:
    """A replica in a phase, with the rules of generation/engine.py and of megatron-core's scheduler.

    A response begins where there is room for what it has; in a full cache the newest one is evicted.
    """

    replica: Replica
    limit: int
    """Responses in flight, at most."""
    segment_tokens: int
    own: deque[_Group]
    """Groups that this replica began in an earlier phase, and has not taken yet."""
    going_on: list[_Group] = field(default_factory=list)
    """Those that go on in the next phase."""
    waiting: deque[_Response] = field(default_factory=deque)
    running: dict[int, _Response] = field(default_factory=dict)
    """By number, the newest last: an evicted response begins again before any newer one."""
    ends: list[tuple[int, int]] = field(default_factory=list)
    """A heap: the step with the last token of the phase, and the number, of each that runs; and of some evicted."""
    present: Counter[int] = field(default_factory=Counter)
    """Running responses by group: the first brings the prompt, the last takes it away."""
    groups: int = 0
    begun: int = 0
    now: int = 0
    """Steps done."""
    seconds: float = 0.0
    tokens: int = 0
    cached: int = 0
    """Tokens in the cache."""
    ended: list[tuple[int, float]] = field(default_factory=list)
    """Tokens and seconds so far when each response ended."""
    continued: int = 0
    evicted: bool = False
    """A response was evicted, and none has ended since: there is no room."""

    @property
    def has_room(self) -> bool:
        """Return whether a group may begin."""
        in_flight = len(self.running) + len(self.waiting)
        return not in_flight or in_flight + self.replica.responses_per_prompt <= self.limit

    @property
    def full_rate(self) -> float:
        """Return the tokens a second until most of the responses have ended."""
        if not self.ended:
            return 0.0
        tokens, seconds = self.ended[math.ceil(_FULL_PART * len(self.ended)) - 1]
        return tokens / seconds

    def begin(self, group: _Group) -> None:
        """Take a group, whose responses wait for their place."""
        for start, length in group:
            end = min(length, start + self.segment_tokens)
            self.waiting.append(_Response(self.begun, self.groups, start, end))
            self.begun += 1
            self.continued += start
        if any(start for start, _ in group):
            self.continued += self.replica.prompt_tokens
        if rest := _rest(group, self.segment_tokens):
            self.going_on.append(rest)
        self.groups += 1

    def advance(self) -> None:
        """Decode until a response ends or the cache is full."""
        self._fill()
        count = len(self.running)
        steps, room = self._next_end() - self.now, int((self.replica.cache_tokens - self.cached) // count)
        self.evicted = count > 1 and room < steps
        if self.evicted:
            steps = max(0, room)
        average = self.cached + count * steps / 2
        self.seconds += steps * self.replica.cost.step_seconds(count, average)
        self.tokens += steps * count
        self.cached += steps * count
        self.now += steps
        if self.evicted:
            _, newest = self.running.popitem()
            newest.start = newest.end - (newest.last - self.now)
            self._release(newest, newest.start)
            self.waiting.appendleft(newest)
        while self.running and self._next_end() == self.now:
            _, number = heapq.heappop(self.ends)
            ended = self.running.pop(number)
            self._release(ended, ended.end)
            self.ended.append((self.tokens, self.seconds))

    def _next_end(self) -> int:
        """Return the step in which a response that runs ends first."""
        while True:
            last, number = self.ends[0]
            response = self.running.get(number)
            if response is not None and response.last == last:
                return last
            heapq.heappop(self.ends)

    def _fill(self) -> None:
        """Let responses begin, in order, as far as there is room."""
        while self.waiting and len(self.running) < self.replica.max_requests:
            response = self.waiting[0]
            needed = response.start + (0 if self.present[response.group] else self.replica.prompt_tokens)
            if self.running and (self.evicted or self.cached + needed >= self.replica.cache_tokens):
                return
            self.waiting.popleft()
            response.last = self.now + response.end - response.start
            self.running[response.number] = response
            heapq.heappush(self.ends, (response.last, response.number))
            self.present[response.group] += 1
            self.cached += needed

    def _release(self, response: _Response, tokens: int) -> None:
        """Take a response out of the cache, and its prompt with the last one."""
        self.present[response.group] -= 1
        self.cached -= tokens + (0 if self.present[response.group] else self.replica.prompt_tokens)
