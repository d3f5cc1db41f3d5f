"""The responses of an evaluation that is under way: one JSON line each, appended, so that an interrupted one goes on.

`evaluation-NAME.unfinished.jsonl` begins with the settings that its rows depend on; it is gone when the result
and `evaluation-NAME.rollouts.jsonl` are written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TypedDict, cast

from megatron_r1v2.evaluation.rollout_records import RolloutRecord
from megatron_r1v2.resilience.fingerprint import Fingerprint
from megatron_r1v2.types import AnswerType


class JudgeVerdict(TypedDict):
    """The words of a judge about a response."""

    verdict: bool | None
    """None: there is no verdict in them."""
    text: str
    model: str


class ResponseRow(RolloutRecord):
    """A line of `evaluation-NAME.rollouts.jsonl`: a response of an evaluation, with all that its verdict depends on."""

    sample_index: int
    answer_type: AnswerType
    alternatives: list[str]
    tolerances: list[float]
    facts: dict[str, str]
    metadata: dict[str, str]
    rule_correct: bool
    judge: JudgeVerdict | None
    """None: the judge was not asked."""


class ResponseLog:
    """Rows on disk by (prompt key, sample index); use it as a context manager."""

    def __init__(self, path: Path, fingerprint: Fingerprint) -> None:
        """Read the rows of an interrupted evaluation, and open the file to append.

        Args:
            path: of the unfinished evaluation; made when it is not there.
            fingerprint: all that the rows depend on.

        Raises:
            ValueError: the file is of an evaluation with other settings, or damaged in the middle.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rows, whole = _read(path, fingerprint)
        self._file = path.open("r+b" if path.exists() else "wb")
        # A line that was being written when the evaluation ended has no end; the next one must not be glued to it.
        self._file.truncate(whole)
        self._file.seek(whole)
        if not whole:
            self._write([{"settings": fingerprint.values}])

    def __enter__(self) -> ResponseLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def rows(self) -> list[ResponseRow]:
        """Return the rows, ordered by prompt key and sample index."""
        return [self._rows[place] for place in sorted(self._rows)]

    @property
    def places(self) -> set[tuple[str, int]]:
        """Return (prompt key, sample index) of every row that is there."""
        return set(self._rows)

    def append(self, rows: Iterable[ResponseRow]) -> None:
        """Write rows so that they outlive this process.

        Args:
            rows: each with a `prompt_key` and a `sample_index`.
        """
        new = list(rows)
        self._write(new)
        self._rows |= {_place(row): row for row in new}

    def discard(self) -> None:
        """Delete the file: the evaluation is finished."""
        self._file.close()
        self.path.unlink()

    def _write(self, lines: Iterable[Mapping[str, object]]) -> None:
        self._file.write(b"".join(json.dumps(line, allow_nan=False).encode() + b"\n" for line in lines))
        self._file.flush()
        # A response takes minutes: it must outlive the machine, not only the process.
        os.fsync(self._file.fileno())


def _place(row: ResponseRow) -> tuple[str, int]:
    return row["prompt_key"], row["sample_index"]


def _read(path: Path, fingerprint: Fingerprint) -> tuple[dict[tuple[str, int], ResponseRow], int]:
    """Return the rows, and how many bytes of the file are whole lines."""
    if not path.exists():
        return {}, 0
    rows: dict[tuple[str, int], ResponseRow] = {}
    whole = 0
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if not line.endswith(b"\n"):
                break
            try:
                content = json.loads(line)
                if number:
                    row = cast(ResponseRow, content)  # written by `append`; a line without a place raises below
                    rows[_place(row)] = row
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number + 1} is damaged ({error!r}); delete the line to generate that response "
                    "again, or the file to start over"
                ) from error
            if number == 0:
                _check_settings(path, content, fingerprint)
            whole += len(line)
    return rows, whole


def _check_settings(path: Path, header: object, now: Fingerprint) -> None:
    settings = header.get("settings") if isinstance(header, dict) else None
    changed = "it does not begin with its settings"
    if isinstance(settings, dict):
        changes = now.changes_since(Fingerprint.of(**settings))
        if not changes:
            return
        changed = ", ".join(f"{change.setting} was {change.old!r} and is {change.new!r}" for change in changes)
    raise ValueError(
        f"{path} is an unfinished evaluation with other settings: {changed}; put them back to finish it, give this one "
        "another --name, or delete the file"
    )
