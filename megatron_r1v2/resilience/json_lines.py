"""Files of JSON lines that grow while a program runs: a killed writer leaves at most half a line, at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from megatron_r1v2.resilience.files import named_errors


def append_json_lines(path: Path, rows: Iterable[Mapping[str, object]], *, allow_nan: bool = True) -> None:
    """Append rows, which are on the disk when this returns.

    Args:
        allow_nan: also write NaN and infinity, which JSON does not have but Python reads.

    Raises:
        ValueError: a row has such a number and must not; nothing is written.
    """
    content = "".join(json.dumps(row, allow_nan=allow_nan) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with named_errors(path), path.open("ab") as file:
        file.write(content.encode())
        file.flush()
        # The rows must outlive the machine, not only the process: a response can take minutes.
        os.fsync(file.fileno())


def recover_json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of each line, after half a line at the end is taken off; none for a missing file."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        # Otherwise the next line that is appended would be glued to it.
        os.truncate(path, len(whole))
    # At line feeds alone: a text in JSON may hold the other line ends of Unicode.
    yield from enumerate(whole.split(b"\n")[:-1], start=1)
