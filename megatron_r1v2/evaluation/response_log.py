"""The responses of an evaluation that is under way: one JSON line each, appended, so that an interrupted one goes on.

`evaluation-NAME.unfinished.jsonl` begins with the settings that its rows depend on; it is gone when the result
and `evaluation-NAME.rollouts.jsonl` are written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict, cast

from megatron_r1v2.evaluation.rollout_records import RolloutRecord
from megatron_r1v2.resilience.fingerprint import Fingerprint
from megatron_r1v2.resilience.json_lines import append_json_lines, recover_json_lines
from megatron_r1v2.types import AnswerType

_ROWS = "evaluation.rows"


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
    """Rows on disk by (prompt key, sample index)."""

    def __init__(self, path: Path, fingerprint: Fingerprint) -> None:
        """Read the rows of an interrupted evaluation, or begin a file.

        Raises:
            ValueError: the file is of an evaluation with other settings, or damaged in the middle.
        """
        self.path = path
        self._rows = _read(path, fingerprint)
        if not path.exists() or not path.stat().st_size:
            self._write([{"settings": fingerprint.values}])

    @property
    def rows(self) -> list[ResponseRow]:
        """Return the rows, ordered by prompt key and sample index."""
        return [self._rows[place] for place in sorted(self._rows)]

    @property
    def places(self) -> set[tuple[str, int]]:
        """Return (prompt key, sample index) of every row that is there."""
        return set(self._rows)

    def append(self, rows: Iterable[ResponseRow]) -> None:
        """Write rows so that they outlive this process."""
        new = list(rows)
        self._write(new)
        self._rows |= {_place(row): row for row in new}

    def discard(self) -> None:
        """Delete the file: the evaluation is finished."""
        self.path.unlink()

    def _write(self, rows: Iterable[Mapping[str, object]]) -> None:
        append_json_lines(self.path, rows, allow_nan=False)


def _place(row: ResponseRow) -> tuple[str, int]:
    return row["prompt_key"], row["sample_index"]


def _read(path: Path, fingerprint: Fingerprint) -> dict[tuple[str, int], ResponseRow]:
    rows: dict[tuple[str, int], ResponseRow] = {}
    for number, line in recover_json_lines(path):
        try:
            content = json.loads(line)
            if number > 1:
                row = cast(ResponseRow, content)  # written by `append`; a line without a place raises below
                rows[_place(row)] = row
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is damaged ({error!r}); delete the line to generate that response again, or "
                "the file to start over"
            ) from error
        if number == 1:
            _check_settings(path, content, fingerprint)
    return rows


def _check_settings(path: Path, header: object, now: Fingerprint) -> None:
    settings = header.get("settings") if isinstance(header, dict) else None
    changed = "it does not begin with its settings"
    if isinstance(settings, dict):
        changes = now.changes_since(Fingerprint.of(**settings))
        # Earlier versions have not noted the rows.
        changes = [change for change in changes if change.setting != _ROWS or change.old is not None]
        if not changes:
            return
        changed = ", ".join(f"{change.setting} was {change.old!r} and is {change.new!r}" for change in changes)
    raise ValueError(
        f"{path} is an unfinished evaluation with other settings: {changed}; put them back to finish it, give this one "
        "another --name, or delete the file"
    )
