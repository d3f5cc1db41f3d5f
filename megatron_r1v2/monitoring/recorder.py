"""The numbers of a run while it goes: JSON lines, sample rollouts, a progress display, wandb, TensorBoard."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_r1v2.config.choices import Tracker
from megatron_r1v2.config.schema import LoggingConfig
from megatron_r1v2.monitoring.metrics import console_name
from megatron_r1v2.monitoring.progress import clock
from megatron_r1v2.resilience.files import write_file
from megatron_r1v2.resilience.json_lines import append_json_lines, recover_json_lines

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from wandb import Run as WandbRun
    from wandb import Table

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
STARTS_FILE = "starts.jsonl"
"""A line for each start of the run: when, by which commit, on which machine."""

_WANDB_PROJECT = "megatron_r1v2"
_SECONDS_BETWEEN_LINES = 30.0
_STEPS_AVERAGED = 20
_STEPS_BETWEEN_TABLES = 10
"""wandb keeps every table with its pictures."""
_TABLE_COLUMNS = ("step", "prompt_key", "question", "answer", "text", "correct", "total", "advantage", "finish_reason")


@dataclass(frozen=True)
class RunInfo:
    """The run as its displays name it."""

    name: str
    stage: str
    total_steps: int
    first_step: int
    """Steps that are already done."""
    shown: Sequence[str]
    """Metrics on the console."""
    recipe: Mapping[str, object] = field(default_factory=dict)
    """Its settings, for wandb."""
    num_processes: int = 1
    device: str = ""
    """The name of the main rank's processor or GPU."""
    goes_back: bool = False
    """True where it goes on from a step that was named, so that later ones are done again in another way."""


class PhaseMemory(Protocol):
    """A meter of memory; device_memory.py, which needs torch, has it."""

    def begin(self) -> None:
        """Begin a phase."""

    def end(self, phase: str) -> None:
        """End the phase that began last."""


class Recorder:
    """The collector of a step's numbers, which the main rank writes; on the others it only keeps time."""

    def __init__(
        self,
        run_dir: Path,
        info: RunInfo,
        *,
        settings: LoggingConfig,
        is_main: bool,
        memory: PhaseMemory | None = None,
    ) -> None:
        """Open the files; lines of steps that will be done again after a resume are cut off.

        Args:
            is_main: whether this rank writes.
            memory: hears of each phase that begins and ends; None: none.
        """
        self.run_dir = run_dir
        self.is_main = is_main
        self.shown = info.shown
        self._memory = memory
        self.values: dict[str, float] = {}
        self.steps_done = info.first_step
        self.phase = "setup"
        """The one that `timed` began last."""
        self._started = time.perf_counter()
        self._wandb: WandbRun | None = None
        self._tensorboard: SummaryWriter | None = None
        self._total_steps = info.total_steps
        self._step_seconds: list[float] = []
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        if not is_main:
            return
        # From here on only what the one rank that writes needs.
        run_dir.mkdir(parents=True, exist_ok=True)
        for file in (METRICS_FILE, ROLLOUTS_FILE):
            # What a killed run has done beyond its checkpoint comes again as it was; what came of others does not.
            for line in _cut_after(run_dir / file, info.first_step, keep=info.goes_back or not info.first_step):
                self.log(line)
        is_another = info.goes_back or _is_copy(run_dir)
        append_json_lines(run_dir / STARTS_FILE, [_start_record(info, run_dir)])
        self._open_services(info, settings, is_another=is_another)
        self._progress = Progress(
            TextColumn(f"[bold]{info.stage}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(info.stage, total=info.total_steps, completed=info.first_step, numbers="")
        self._progress.start()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)
        if self._tensorboard is not None:
            self._tensorboard.close()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds that the block takes to `timing_s/PHASE` of this step."""
        start = time.perf_counter()
        self.phase = phase
        if self._memory is not None:
            self._memory.begin()
        try:
            yield
        finally:
            if self._memory is not None:
                self._memory.end(phase)
            # Added up: dynamic sampling generates several times in a step.
            key = f"timing_s/{phase}"
            self.values[key] = self.values.get(key, 0.0) + time.perf_counter() - start

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show how far a task before the steps has come; where there is no terminal, by a line now and then.

        Yields:
            To be called with how much is done.
        """
        if self._progress is None or self._progress.disable:
            yield self._throttled_log(what, total)
            return
        bar = self._progress
        task = bar.add_task(what, total=total, numbers=what)
        try:
            yield lambda done: bar.update(task, completed=done)
        finally:
            bar.remove_task(task)

    def seconds(self, phase: str) -> float:
        """Return the seconds of a phase of this step, measured by `timed`."""
        return self.values[f"timing_s/{phase}"]

    def current_phase(self) -> str:
        """Return the step and the phase that this rank is in."""
        return f"step {self.steps_done + 1}, {self.phase}"

    def step_seconds(self) -> float:
        """Return how long this step has taken so far."""
        return time.perf_counter() - self._started

    def note(self, values: Mapping[str, float]) -> None:
        """Add numbers to this step."""
        self.values.update(values)

    def end_step(self, step: int) -> None:
        """Write the numbers of a step and begin the next.

        Args:
            step: steps done.
        """
        now = time.perf_counter()
        self.values["timing_s/step"] = now - self._started
        self._started = now
        values, self.values = self.values, {}  # a metric of this step must not show in the next
        self.steps_done = step
        if not self.is_main:
            return
        append_json_lines(self.run_dir / METRICS_FILE, [{"step": step, **values}])
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        self._show(step, values)

    def note_changes(self, changes: Sequence[str]) -> None:
        """Write for the report which settings a resumed run has changed."""
        if changes and self.is_main:
            append_json_lines(
                self.run_dir / METRICS_FILE, [{"step": self.steps_done, "settings_changed": list(changes)}]
            )

    def write_rollouts(self, records: Sequence[Mapping[str, object]]) -> None:
        """Append sample rollouts for the report, on the main rank, and now and then a table of them for wandb."""
        if not self.is_main:
            return
        append_json_lines(self.run_dir / ROLLOUTS_FILE, records)
        if self._wandb is not None and records and self.steps_done % _STEPS_BETWEEN_TABLES == 0:
            self._wandb.log({"rollouts": wandb_table(records)}, step=self.steps_done + 1)

    def log(self, message: str) -> None:
        """Print a line on the main rank."""
        if self.is_main:
            # As it is: in a job's log, rich would break lines at 80 columns; and "[adapter]" is no markup.
            self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def _throttled_log(self, what: str, total: int) -> Callable[[int], None]:
        last_line = float("-inf")

        def log(done: int) -> None:
            nonlocal last_line
            if done >= total or time.monotonic() - last_line >= _SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                self.log(f"{what}: {done} of {total}")

        return log

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        numbers = "  ".join(f"{console_name(name)} {values[name]:.3g}" for name in self.shown if name in values)
        if self._progress is not None and not self._progress.disable:
            self._progress.update(self._task, completed=step, numbers=numbers)
        else:
            self._step_seconds.append(values["timing_s/step"])
            # The first step of a start holds what comes before it.
            seconds = statistics.fmean((self._step_seconds[1:] or self._step_seconds)[-_STEPS_AVERAGED:])
            left = self._total_steps - step
            to_go = f", about {clock(seconds * left)} to go" if left > 0 else ""
            self.log(f"step {step}  {numbers}  {self._step_seconds[-1]:.2f} s{to_go}")

    def _open_services(self, info: RunInfo, settings: LoggingConfig, *, is_another: bool) -> None:
        # Both take seconds to import and are seldom on.
        if {Tracker.wandb, Tracker.wandb_offline} & set(settings.trackers):
            import wandb

            self._wandb = wandb.init(
                # None leaves it to wandb's environment variable.
                project=settings.wandb_project or os.environ.get("WANDB_PROJECT", _WANDB_PROJECT),
                entity=settings.wandb_entity or None,
                group=settings.wandb_group or None,
                tags=settings.wandb_tags or None,
                name=info.name,
                config=dict(info.recipe),
                job_type=info.stage,
                id=_stable_id(self.run_dir, is_another=is_another),
                resume="allow",
                mode="online" if Tracker.wandb in settings.trackers else "offline",
                dir=str(self.run_dir),
            )
        if Tracker.tensorboard in settings.trackers:
            from torch.utils.tensorboard import SummaryWriter

            # Steps that a killed run has written beyond its checkpoint are done, and written, again.
            self._tensorboard = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=info.first_step + 1)


def wandb_table(records: Sequence[Mapping[str, object]]) -> Table:
    """Return sample rollouts as a table of wandb: picture, texts, the reward and its parts."""
    import wandb
    from PIL import Image

    rewards = {name: None for record in records for name in _parts(record)}
    table = wandb.Table(columns=["image", *_TABLE_COLUMNS, *(f"reward/{name}" for name in rewards)])
    for record in records:
        png = record.get("image_png")
        picture = wandb.Image(Image.open(BytesIO(b64decode(png)))) if isinstance(png, str) else None
        parts = _parts(record)
        table.add_data(picture, *(record.get(name) for name in _TABLE_COLUMNS), *(parts.get(name) for name in rewards))
    return table


def _parts(record: Mapping[str, object]) -> Mapping[str, float]:
    parts = record.get("rewards")
    return parts if isinstance(parts, dict) else {}


def _start_record(info: RunInfo, run_dir: Path) -> dict[str, object]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "stage": info.stage,
        "steps_done": info.first_step,
        "version": _version(),
        "commit": _commit(),
        "host": platform.node(),
        "processes": info.num_processes,
        "device": info.device,
        **_place(run_dir),
    }


def _place(run_dir: Path) -> dict[str, object]:
    """Return what tells a folder from its copy: moved it keeps its inode, mounted anew its path."""
    return {"folder": str(run_dir.absolute()), "inode": run_dir.stat().st_ino}


def _is_copy(run_dir: Path) -> bool:
    """Return whether the newest start of the run was in another folder, of which this is a copy."""
    before: dict[str, object] = {}
    for _, line in recover_json_lines(run_dir / STARTS_FILE):
        with suppress(json.JSONDecodeError):
            before = json.loads(line)
    here = _place(run_dir)
    return before.keys() >= here.keys() and all(before[name] != value for name, value in here.items())


def _version() -> str:
    """Return the version of the installed package; "" where it is used from its folder alone."""
    try:
        return version("megatron_r1v2")
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """Return the commit of this program, with "-dirty" where its files differ; "" outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _cut_after(path: Path, step: int, *, keep: bool) -> list[str]:
    """Drop lines of later steps (and a line cut in the middle): a resumed run writes them again.

    Args:
        keep: whether to keep these lines beside the file.

    Returns:
        Sentences on what was dropped that is not written again.
    """
    # Read as JSON, not cut by size: a killed run may have written half a line after the last whole step.
    kept, later, damaged = [], [], 0
    for _, line in recover_json_lines(path):
        place = _place_of(line)
        if place is None:
            damaged += 1
        # The changes of a resume from this very step, which left no checkpoint, are noted again.
        elif place <= (step, False):
            kept.append(line + b"\n")
        else:
            later.append(line + b"\n")
    told = [f"{path}: {damaged} lines cannot be read and are left out"] if damaged else []
    if later and keep:
        aside = path.with_name(f"{path.name}.left")
        write_file(aside, b"".join(later))
        told.append(f"{path} had {len(later)} lines of steps after {step}, done before in another way; now in {aside}")
    if later or damaged:
        write_file(path, b"".join(kept))
    return told


def _place_of(line: bytes) -> tuple[int, bool] | None:
    """Return the step of a line, and whether it notes changed settings; None where it is damaged."""
    try:
        record = json.loads(line)
    except ValueError:  # no JSON, or no text
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return (step, "settings_changed" in record) if isinstance(step, int) else None


def _stable_id(run_dir: Path, *, is_another: bool) -> str:
    """Return the id of this run for wandb, the same after a resume.

    Args:
        is_another: whether the curves of the id in the folder are not those of this run.
    """
    file = run_dir / "wandb_id"
    if is_another or not file.is_file():
        # The time, since runs in different places can have the same name.
        write_file(file, f"{run_dir.name}-{time.time_ns():x}")
    return file.read_text()
