"""The cases of benchmarks/step_vs_trl.py and the clock of its systems; imports neither torch nor our package."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from zlib import crc32

RESPONSES = 8
"""To each prompt."""
TEXT_TOKENS = 100
TILE_TOKENS = 64
SIZES = {1: (64, 64), 4: (192, 64), 16: (320, 192)}
"""Width and height of an image that is cut into so many tiles of 64 pixels, thumbnail included."""


@dataclass(frozen=True)
class Case:
    """One kind of step."""

    model: str
    """33m, or demo."""
    parts: str
    """adapter, or all."""
    tiles: int
    """Of the image of each prompt; 0: as the demo has them."""
    response_tokens: int
    prompts: int
    """Of a step."""
    configured: bool = False
    """As a user runs it: stop tokens, answers as rewards, and ours with its buffer. False: compute-matched, all
    responses of full length, each with a reward and so an advantage of its own, no buffer."""

    at_most: tuple[tuple[str, float], ...] = ()
    """The part of other systems' CPU seconds that ours may take."""

    @property
    def warmup(self) -> int:
        """Return the steps of a turn that are not counted; imports and buffers are small beside a long step."""
        return int(self.tiles < 4)

    @property
    def steps(self) -> int:
        """Return the steps of a turn that are counted."""
        return 4 if self.model == "demo" else {1: 2, 4: 1, 16: 1}[self.tiles]

    @property
    def name(self) -> str:
        """Return the name in files and tables."""
        image = f"-image{self.tiles * TILE_TOKENS}" if self.tiles else ""
        return f"{self.model}{image}-response{self.response_tokens}-{self.parts}{'-configured' * self.configured}"

    @property
    def data(self) -> str:
        """Return the folder of its prompts."""
        return f"{self.model}-{self.tiles}"


CASES = {
    case.name: case
    for case in (
        Case("33m", "adapter", 1, 48, 4, at_most=(("trl", 0.8), ("loop", 1.0))),
        Case("33m", "adapter", 16, 200, 1, at_most=(("trl", 0.45),)),
        Case("demo", "adapter", 0, 32, 48, configured=True, at_most=(("trl", 0.43),)),
        Case("33m", "all", 1, 48, 4),
        *(Case("33m", parts, 4, 48, 2) for parts in ("adapter", "all")),
        *(Case("33m", "adapter", *sizes) for sizes in ((1, 200, 4), (4, 200, 2), (16, 48, 1))),
        *(Case("demo", parts, 0, 32, 48) for parts in ("adapter", "all")),
        Case("33m", "all", 16, 200, 1),
    )
}
"""The most telling first."""


@dataclass
class Clock:
    """The CPU and wall seconds of steps, by phase."""

    steps: list[dict[str, float]] = field(default_factory=list)
    now: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    """Of the responses of the step."""

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of the block to a phase."""
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            yield
        finally:
            for name, seconds in ((phase, time.process_time() - cpu), (f"{phase}_wall", time.perf_counter() - wall)):
                self.now[name] = self.now.get(name, 0.0) + seconds

    def end_step(self) -> None:
        """Keep the numbers of a step."""
        self.steps.append({**self.now, "response_tokens": self.tokens})
        self.now = {}


@dataclass(frozen=True)
class Turn:
    """One process: some steps of one system."""

    system: str
    case: str
    settings: dict[str, object]
    """As the system runs it."""
    steps: list[dict[str, float]]
    """Warm-up left out."""

    def write(self, path: Path) -> None:
        """Write the turn for the report."""
        path.write_text(json.dumps(asdict(self)))


def read_prompts(work: Path, case: Case) -> list[dict[str, str]]:
    """Return the prompts of a case: `key`, `text` without its placeholder of the image, `image` (a file), `answer`."""
    prompts: list[dict[str, str]] = json.loads((work / case.data / "prompts.json").read_text())
    return prompts


def pseudo(response: str, **_: object) -> float:
    """Return a reward from 0 to 1 that differs between any two responses; also a function of `reward.functions`."""
    return crc32(response.encode()) % 997 / 996
