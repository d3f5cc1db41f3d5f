"""Rows of published files as they are: parquet with images inside, JSON and JSONL with images beside."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_r1v2.data.row_files import parquet_rows
from megatron_r1v2.data.samples import SampleError

RowOfFile = Mapping[str, object]
_SUFFIXES = (".parquet", ".jsonl", ".json")
# As `datasets` names the files of a split on the hub; the one to be scored first.
_SPLITS = ("validation", "testmini", "test", "train", "dev")
_SPLIT_FILE = re.compile(rf"({'|'.join(_SPLITS)})-\d+-of-\d+")


def find_files(path: Path) -> list[Path]:
    """Return the data files at a path, in order.

    Args:
        path: a file, or a folder that is searched to its depths.

    Raises:
        ValueError: no data file.
    """
    if path.is_file() and path.suffix in _SUFFIXES:
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES) if path.is_dir() else []
    if not files:
        raise ValueError(
            f"--input {path}: there is no {', '.join(_SUFFIXES)} file; give the file or folder as downloaded"
        )
    return files


def check_one_split(files: Sequence[Path]) -> None:
    """Refuse the files of several splits, whose score would be that of none.

    Raises:
        ValueError: it names the splits.
    """
    names = {match[1] for file in files if (match := _SPLIT_FILE.match(file.name))}
    if len(names) > 1:
        splits = sorted(names, key=_SPLITS.index)
        raise ValueError(
            f"the files are of several splits ({', '.join(splits)}), and a score is of one; "
            f"give --only '{splits[0]}-*' or another, or --only '*' for all"
        )


def read_rows(path: Path) -> Iterator[tuple[str, RowOfFile]]:
    """Read a data file.

    Args:
        path: parquet, JSONL, or JSON with a list of rows or a mapping from id to row.

    Yields:
        (where the row is, for errors; the row).

    Raises:
        ValueError: the file is damaged, or of another kind than its name says.
    """
    if path.suffix == ".parquet":
        for number, row in enumerate(parquet_rows(path), start=1):
            yield f"{path}, row {number}", row
        return
    try:
        # Some programs begin a file with a byte order mark, which JSON has no place for.
        text = path.read_text(encoding="utf-8-sig")
        # Not splitlines(): a text in JSON may hold the other line ends of Unicode as they are.
        lines = [line for line in text.split("\n") if line.strip()] if path.suffix == ".jsonl" else [text]
        whole: list[object] = [json.loads(line) for line in lines]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    content = whole[0] if path.suffix == ".json" else whole
    if not isinstance(content, dict | list):
        raise ValueError(f"{path}: expected a list of rows or a mapping from id to row, got {type(content).__name__}")
    rows = content.items() if isinstance(content, dict) else enumerate(content, start=1)
    for name, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {name}: expected an object, got {type(row).__name__}")
        yield f"{path}, row {name}", row


def image_bytes(value: object, folder: Path) -> bytes | None:
    """Return an encoded image.

    Args:
        value: {"bytes": ..., "path": ...} as parquet holds it, a path below the folder, or None.

    Returns:
        None: there is no image.

    Raises:
        SampleError: the image is missing, or the value is no image.
    """
    if isinstance(value, Mapping):
        if value.get("bytes"):
            return bytes(value["bytes"])
        value = value.get("path")
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise SampleError(f"an image is a path or a struct of bytes and path, got {type(value).__name__}")
    path = folder / value
    if not path.is_file():
        raise SampleError(f"image {path} does not exist; give the folder of the images with --images")
    return path.read_bytes()


def text_list(value: object, name: str) -> list[str]:
    """Return a list of texts, which some data sets write as the text of a Python list: "['3', '5']".

    Args:
        value: a list, such a text, or None.
        name: of the field, for errors.

    Raises:
        SampleError: it is neither.
    """
    if value is None or value == "":
        return []
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise SampleError(f"{name} is not the text of a list: {value!r:.80}") from error
    if not isinstance(value, list | tuple):
        raise SampleError(f"{name} must be a list, got {value!r:.80}")
    return [str(item) for item in value]
