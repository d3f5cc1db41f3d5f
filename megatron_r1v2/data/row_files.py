"""Files of rows: JSONL, JSON, CSV, parquet, and folders that `datasets` has saved or downloaded."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_r1v2.data.samples import JsonObject, SampleError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
_TABLES = (".csv", ".tsv")
_SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")
_ROWS_AT_ONCE = 32
_SPLIT = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])")
# Written by `datasets` beside the rows.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class RawRow:
    """A row as its file has it."""

    number: int
    """From 1; the line of a JSONL file."""
    place: str
    """Such as "rows.jsonl, line 3"."""
    content: object
    """The decoded row, of whatever type; or the SampleError of a line that cannot be decoded."""


def find_inputs(paths: Sequence[Path]) -> list[Path]:
    """Return the files of rows at several paths, in order, each once.

    Args:
        paths: files, and folders: one that `datasets` has saved, or one with files of rows of a single split.

    Raises:
        ValueError: a path is missing or holds no rows, or a folder holds several splits.
    """
    files = [file for path in paths for file in _find(path)]
    if len({file.resolve() for file in files}) < len(files):
        raise ValueError(f"a file of rows is given twice: {', '.join(map(str, files))}; give each once")
    return files


def _find(path: Path) -> list[Path]:
    if path.suffix.lower() in _SPREADSHEETS:
        raise ValueError(f"{path} is a spreadsheet, which is not read; save its sheet as CSV (UTF-8) and give that")
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; give a JSONL, JSON or parquet file, or a folder of them")
    if (path / "dataset_dict.json").is_file():
        splits = sorted(child for child in path.iterdir() if (child / "state.json").is_file())
        if len(splits) != 1:
            raise ValueError(f"{path} holds the splits {', '.join(s.name for s in splits)}; give one: {path}/SPLIT")
        return _find(splits[0])
    files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.name not in _DESCRIPTIONS)
    # Beside rows of another kind a table is a list of something else.
    files = files or sorted(f for f in path.rglob("*") if f.suffix.lower() in _TABLES)
    if not files:
        raise ValueError(f"{path} holds no {', '.join(SUFFIXES)} file; give a folder with files of rows")
    if (path / "state.json").is_file():
        return files
    # A folder as downloaded: training on its test split would go unnoticed.
    found = {match[1] for f in files for part in f.relative_to(path).parts if (match := _SPLIT.match(part.lower()))}
    if len(found) > 1:
        raise ValueError(f"{path} holds the splits {', '.join(sorted(found))}; give the files of one")
    return files


def read_file(path: Path) -> Iterator[RawRow]:
    """Read the rows of a file, one at a time.

    Raises:
        ValueError: the whole file cannot be read.
    """
    if path.suffix in (".parquet", ".arrow"):
        yield from _numbered(path, parquet_rows(path) if path.suffix == ".parquet" else _arrow_rows(path))
    elif path.suffix.lower() in _TABLES:
        yield from _table_rows(path)
    elif path.suffix == ".json" and (whole := _read_json(path)) is not None:
        yield from _numbered(path, whole)
    else:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield RawRow(number, f"{path}, line {number}", _decode(line))


def _numbered(path: Path, rows: Iterable[object]) -> Iterator[RawRow]:
    for number, row in enumerate(rows, start=1):
        yield RawRow(number, f"{path}, row {number}", row)


def count_rows(path: Path) -> int | None:
    """Count the rows of a JSONL file, which costs little compared with reading them; None for other files."""
    if path.suffix in (".json", ".parquet", ".arrow") or path.suffix.lower() in _TABLES:
        return None
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _table_rows(path: Path) -> Iterator[RawRow]:
    """Read the rows of a CSV or TSV file as a spreadsheet or pandas writes it; every cell is a text."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            start = file.readline()
            file.seek(0)
            # Spreadsheets separate by semicolons where the comma is the decimal point.
            delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=start.count)
            lines = csv.reader(file, delimiter=delimiter, strict=True)
            names = _column_names(path, next(lines, []))
            first_line, number = lines.line_num + 1, 0
            for cells in lines:
                if cells:
                    number += 1
                    yield RawRow(number, f"{path}, line {first_line}", _table_row(names, cells))
                first_line = lines.line_num + 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {lines.line_num}: {error}; a text with a comma, a quote or a line break stands in quotes, "
            'a quote in it twice ("")'
        ) from error


def _column_names(path: Path, header: Sequence[str]) -> list[str]:
    """Return the names in the first line; pandas leaves that of its index empty."""
    names = [name.strip() for name in header]
    if not any(names):
        raise ValueError(f"{path}: the first line is empty; it must name the columns, such as question,answer,image")
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise ValueError(f"{path}: two columns are named {twice[0]!r}; give each a name of its own")
    return names


def _table_row(names: Sequence[str], cells: Sequence[str]) -> object:
    if len(cells) != len(names):
        return SampleError(
            f"the row has {len(cells)} cells, the first line names {len(names)} columns; a text with a comma, or "
            "whatever separates cells, stands in quotes"
        )
    return {name: cell for name, cell in zip(names, cells, strict=True) if name}


def parquet_rows(path: Path) -> Iterator[JsonObject]:
    """Read the rows of a parquet file.

    Raises:
        ValueError: it is no parquet file, or pyarrow is not installed.
    """
    _need_pyarrow(path)
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from error
    try:
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}; copy it again") from error


def _arrow_rows(path: Path) -> Iterator[JsonObject]:
    """Read the rows of an Arrow stream, the format of `save_to_disk` of `datasets`."""
    _need_pyarrow(path)
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
            for batch in stream:
                for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                    yield from batch.slice(start, _ROWS_AT_ONCE).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Arrow stream as `datasets` saves it: {error}") from error


def _need_pyarrow(path: Path) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        kind = path.suffix.removeprefix(".")
        raise ValueError(f"{path}: reading {kind} needs pyarrow; pip install 'megatron_r1v2[evaluation]'")


def _read_json(path: Path) -> list[object] | None:
    """Return the rows of a JSON file: a list, or a mapping of ids to rows; None where it holds a row a line."""
    text = path.read_bytes()
    content = _decode(text)
    if isinstance(content, SampleError) and text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        raise ValueError(f"{path} is not a list of rows: {content}")
    if isinstance(content, list):
        return content
    if isinstance(content, dict) and content and all(isinstance(row, dict) for row in content.values()):
        return list(content.values())
    return None


def _decode(text: bytes) -> object:
    """Return decoded JSON, or the SampleError of what is none."""
    try:
        return json.loads(text)
    except RecursionError:
        return SampleError("not JSON that can be read: nested too deeply")
    except ValueError as error:  # bad syntax, bad UTF-8, or a number of thousands of digits
        return SampleError(f"not JSON: {error}")
