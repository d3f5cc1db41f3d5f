"""The steps of an example as processes, each with a log and a line of progress; one that is done is not run again.

    python -m examples.stages runs/digits align r1v2 align examples/digits/align.yaml

runs the command as the step `align` of the example in `runs/digits`: see `examples/steps.sh`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from megatron_r1v2.resilience.files import write_file
from megatron_r1v2.resilience.fingerprint import Fingerprint

POLL_SECONDS = 0.25
TAIL_LINES = 30


@dataclass(frozen=True)
class Stage:
    """One command of an example.

    Example: Stage("align", ("r1v2", "align", "examples/digits/align.yaml")).
    """

    name: str
    command: tuple[str, ...]
    """A program of the environment and its arguments."""

    def __str__(self) -> str:
        """Return the command as one types it."""
        return shlex.join(self.command)


class StageError(RuntimeError):
    """A stage failed; the message says which, and ends with the end of its log."""


@dataclass
class _Running:
    stage: Stage
    fingerprint: Fingerprint
    process: subprocess.Popen[bytes]
    log: Path
    start: float


class StageRunner:
    """A runner of stages below one folder, which remembers the finished ones.

    A finished stage leaves `stages/NAME.json` with its command and its seconds. The same command is not run again;
    another command under the same name is an error, because later stages were made from the old result.

    Args:
        folder: where logs and records go.
        threads: of each process, when one runs at a time.
        console: where progress is shown.
    """

    def __init__(self, folder: Path, *, threads: int, console: Console) -> None:
        self._logs, self._records = folder / "logs", folder / "stages"
        self._threads, self._console = threads, console
        self.seconds: dict[str, float] = {}
        for path in (self._logs, self._records):
            path.mkdir(parents=True, exist_ok=True)

    def run(self, *stages: Stage) -> None:
        """Run stages side by side until all are done; the first that fails ends the others.

        Raises:
            StageError: a stage failed, its program or recipe is missing, or it was done before with another command.
        """
        self.run_chains([[stage] for stage in stages], at_once=len(stages))

    def run_chains(self, chains: Sequence[Sequence[Stage]], *, at_once: int) -> None:
        """Run chains of stages, each in its order, several chains side by side; the first failure ends them all.

        Args:
            chains: stages that depend on nothing but the stages before them in their chain.
            at_once: how many chains at a time; they share the threads.

        Raises:
            StageError: a stage failed, its program or recipe is missing, or it was done before with another command.
        """
        waiting = deque(deque(stage for stage in chain if not self._is_done(stage)) for chain in chains)
        threads = max(1, self._threads // max(1, min(at_once, sum(bool(chain) for chain in waiting))))
        running: list[tuple[_Running, deque[Stage]]] = []
        try:
            with Live(console=self._console, refresh_per_second=4, transient=True) as live:
                while waiting or running:
                    while waiting and len(running) < at_once:
                        chain = waiting.popleft()
                        if chain:
                            running.append((self._start(chain.popleft(), threads), chain))
                    live.update(Group(*(_line(item) for item, _ in running)))
                    time.sleep(POLL_SECONDS)
                    done = [self._finish(item) for item, _ in running]
                    waiting.extendleft(chain for (_, chain), ended in zip(running, done, strict=True) if ended)
                    running = [pair for pair, ended in zip(running, done, strict=True) if not ended]
        finally:
            for item, _ in running:
                item.process.terminate()
            for item, _ in running:
                item.process.wait()

    def _is_done(self, stage: Stage) -> bool:
        record = self._records / f"{stage.name}.json"
        if not record.is_file():
            return False
        done = json.loads(record.read_text(encoding="utf-8"))
        earlier = Fingerprint.of(command=done["command"], recipes=done.get("recipes"))
        changed = {change.setting for change in _fingerprint(stage).changes_since(earlier)}
        if changed - {"command"}:
            raise StageError(
                f"stage {stage.name} was done with another version of its recipe ({', '.join(_recipes(stage))}); "
                f"remove {self._records.parent} to start again, or move it away"
            )
        if changed:
            raise StageError(
                f"stage {stage.name} was done with another command ({shlex.join(done['command'])}); now it would be "
                f"{stage}. Remove {self._records.parent} to start again, or move it away"
            )
        self.seconds[stage.name] = done["seconds"]
        self._print(f"{stage.name:<18} done before ({done['seconds']:.0f} s)")
        return True

    def _start(self, stage: Stage, threads: int) -> _Running:
        log = self._logs / f"{stage.name}.log"
        environment = _environment(threads)
        program = stage.command[0]
        if shutil.which(program, path=environment["PATH"]) is None:
            raise StageError(
                f"stage {stage.name} needs {program!r}, which is not on PATH; install what the repository needs and "
                "activate its environment: make install && source .venv/bin/activate"
            )
        fingerprint = _fingerprint(stage)  # before it runs: a recipe that is edited meanwhile is another one
        self._print(f"{stage.name:<18} $ {stage}")
        with log.open("wb") as file:
            process = subprocess.Popen(
                stage.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        return _Running(stage, fingerprint, process, log, time.perf_counter())

    def _finish(self, item: _Running) -> bool:
        """Record a process that has ended; False while it runs."""
        code = item.process.poll()
        if code is None:
            return False
        seconds = time.perf_counter() - item.start
        if code:
            tail = "\n".join(_lines(item.log)[-TAIL_LINES:])
            raise StageError(
                f"stage {item.stage.name} failed with exit code {code} after {seconds:.0f} s; its log {item.log} ends:"
                f"\n\n{tail}\n\ncommand: {item.stage}"
            )
        self.seconds[item.stage.name] = seconds
        record = self._records / f"{item.stage.name}.json"
        done = {**item.fingerprint.values, "seconds": round(seconds, 1)}
        write_file(record, json.dumps(done) + "\n")
        self._print(f"{item.stage.name:<18} done in {seconds:.0f} s")
        return True

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _fingerprint(stage: Stage) -> Fingerprint:
    return Fingerprint.of(command=stage.command, recipes=_recipes(stage))


def _recipes(stage: Stage) -> dict[str, str]:
    """Return the checksum of every recipe that a stage's command names: an edited one makes another result."""
    recipes = [argument for argument in stage.command if argument.endswith(".yaml")]
    for recipe in recipes:
        if not Path(recipe).is_file():
            raise StageError(
                f"stage {stage.name} is made by the recipe {recipe}, which does not exist; put the file back (those of "
                "the repository: git checkout -- FILE) and run the same command again"
            )
    return {recipe: hashlib.sha256(Path(recipe).read_bytes()).hexdigest() for recipe in recipes}


def _environment(threads: int) -> Mapping[str, str]:
    # The children import this repository also where it is not installed.
    paths: Sequence[str] = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        # `python`, `r1v2` and `torchrun` are those of this environment, also where it is not activated.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        # A stage is a process group of one; torch's usual port may be another job's.
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _line(item: _Running) -> Text:
    lines = _lines(item.log)
    seconds = time.perf_counter() - item.start
    text = f"{item.stage.name:<18} {seconds:4.0f} s  {lines[-1].strip() if lines else ''}"
    return Text(text, overflow="ellipsis", no_wrap=True)


def _lines(log: Path) -> list[str]:
    """Return the lines of a log that are not empty, a rewritten line in its last form."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n") if line.strip()]


def read_steps(script: Path) -> list[Stage]:
    """Return the steps of an example's script, in their order."""
    environment = {**os.environ, "LIST_STEPS": "1"}
    listed = subprocess.run(["bash", str(script)], check=True, capture_output=True, text=True, env=environment)
    return [Stage(name, tuple(command)) for name, *command in _records(listed.stdout)]


def _records(text: str) -> Iterator[list[str]]:
    """Yield the arguments of each line that `step` prints, which end in null characters."""
    for record in text.split("\0\n")[:-1]:
        yield record.split("\0")


def main(arguments: Sequence[str]) -> None:
    """Run one step: the example's folder, the step's name, and its command."""
    folder, name, *command = arguments
    console = Console()
    # A script that fails ends the steps beside the failed one; their processes must end with them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        StageRunner(Path(folder), threads=int(os.environ.get("OMP_NUM_THREADS", "1")), console=console).run(
            Stage(name, tuple(command))
        )
    except StageError as error:
        console.print(f"error: {error}", markup=False, highlight=False, style="red", soft_wrap=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main(sys.argv[1:])
