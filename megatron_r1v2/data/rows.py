"""Rows of JSONL with images beside them: the input of `r1v2 prepare`, read into checked samples.

The fields of a row show its kind: our own, MMPR's or verl's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from megatron_r1v2.data.images import name_images, storable_image
from megatron_r1v2.data.samples import (
    IMAGE_PLACEHOLDER,
    SCHEMA_VERSION,
    JsonObject,
    SampleError,
    ShardSample,
    check_key,
    encode_record,
)
from megatron_r1v2.types import AnswerType

Message = Mapping[str, str]


def read_rows(
    path: str | Path,
    images: str | Path,
    *,
    answer_type: AnswerType = "math",
    report: Callable[[str], None] | None = None,
) -> Iterator[ShardSample]:
    """Read and check the rows of a JSONL file.

    Args:
        path: a file with a JSON object in each line; empty lines are skipped.
        images: the folder that image paths are relative to.
        answer_type: the answer type of rows that do not state one (verl, MMPR).
        report: called with the message of each bad row, which is then left out; None: the first bad row is an error.

    Raises:
        ValueError: the file cannot be read as JSONL, or a row is bad and `report` is None; the message has its line.
    """
    source = Path(path)
    check_inputs(source, Path(images))
    # Rows without a key are named by file and line. Keys allow fewer characters than file names.
    stem = re.sub(r"[^A-Za-z0-9]+", "-", source.stem).strip("-") or "row"
    lines_by_key: dict[str, int] = {}
    with source.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                sample = _sample(line, f"{stem[:60]}-{number:08d}", Path(images), answer_type)
                if sample.key in lines_by_key:
                    raise SampleError(f"key {sample.key!r} was used in line {lines_by_key[sample.key]} already")
            except SampleError as error:
                message = f"{source}, line {number}: {error}"
                # With `report`, all bad rows of a file are listed in one run.
                if report is None:
                    raise SampleError(message) from error
                report(message)
                continue
            lines_by_key[sample.key] = number
            yield sample


def check_inputs(source: Path, images: Path) -> None:
    """Check that the file is JSONL and that the folder of images exists.

    Raises:
        ValueError: one of them is not usable.
    """
    if source.suffix == ".parquet":
        raise ValueError(
            f"{source}: parquet is not supported yet (it would need pyarrow); write it as JSONL first, "
            "for example with pandas: read_parquet(...).to_json(..., orient='records', lines=True)"
        )
    if not source.is_file():
        raise ValueError(f"{source} does not exist; give a JSONL file")
    if not images.is_dir():
        raise ValueError(f"--images {images} is not a folder")


def _sample(line: bytes, default_key: str, images: Path, answer_type: AnswerType) -> ShardSample:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SampleError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise SampleError(f"expected a JSON object, got {type(row).__name__}")
    if "messages" in row:
        fields = _own_fields(row)
    elif {"question", "chosen", "rejected"} <= set(row):
        fields = _mmpr_fields(row, answer_type)
    elif {"prompt", "reward_model"} <= set(row):
        fields = _verl_fields(row, answer_type)
    else:
        raise SampleError(
            f"unknown kind of row with fields {', '.join(sorted(row))}; a row needs messages (our own), "
            "question, chosen and rejected (MMPR), or prompt and reward_model (verl)"
        )
    key = str(fields.pop("key", default_key))
    check_key(key)
    encoded = [_load_image(images, path) for path in fields.pop("images")]
    named = name_images(encoded)
    sample = ShardSample(key=key, images=named, **fields)
    # For its check of the schema, so that a bad row is named by its line.
    encode_record(sample)
    return sample


def _own_fields(row: JsonObject) -> JsonObject:
    known = {"key", "messages", "answer", "answer_type", "facts", "images"}
    known |= {"response", "chosen", "rejected", "margin", "source", "alternatives", "tolerances", "metadata"}
    unknown = sorted(set(row) - known - {"schema"})
    if unknown or row.get("schema", SCHEMA_VERSION) != SCHEMA_VERSION:
        what = f"field {unknown[0]!r}" if unknown else f"schema {row['schema']!r} (accepted is {SCHEMA_VERSION})"
        raise SampleError(f"unknown {what}; known fields: {', '.join(sorted(known))}")
    fields = {name: value for name, value in row.items() if name in known}
    return {
        **fields,
        "messages": _messages(row["messages"]),
        "answer": row.get("answer", ""),
        "answer_type": row.get("answer_type", "exact" if "answer" not in row else None),
        "facts": _object(row.get("facts", {}), "facts"),
        "metadata": _object(row.get("metadata", {}), "metadata"),
        "images": _image_paths(row.get("images")),
    }


def _mmpr_fields(row: JsonObject, answer_type: AnswerType) -> JsonObject:
    paths = _image_paths(row.get("image"))
    return {
        "messages": _with_placeholders(_messages([{"role": "user", "content": row["question"]}]), len(paths)),
        "answer": str(row.get("answer", "")),
        "answer_type": answer_type,
        "images": paths,
        "chosen": row["chosen"],
        "rejected": row["rejected"],
        "margin": row.get("margin"),
        "source": row.get("source"),
    }


def _verl_fields(row: JsonObject, answer_type: AnswerType) -> JsonObject:
    reward_model = _object(row["reward_model"], "reward_model")
    if "ground_truth" not in reward_model:
        raise SampleError(f"reward_model has no ground_truth, only {', '.join(sorted(reward_model)) or 'nothing'}")
    paths = _image_paths(row.get("images"))
    return {
        "messages": _with_placeholders(_messages(row["prompt"]), len(paths)),
        "answer": str(reward_model["ground_truth"]),
        "answer_type": answer_type,
        "images": paths,
        "source": row.get("data_source"),
    }


def _object(value: object, name: str) -> JsonObject:
    if not isinstance(value, dict):
        raise SampleError(f"{name} must be an object, got {value!r}")
    return value


def _messages(messages: object) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("content"), str) for message in messages
    ):
        raise SampleError(f"expected a list of messages with a text as content, got {messages!r}")
    return tuple(dict(message) for message in messages)


def _with_placeholders(messages: tuple[Message, ...], images: int) -> tuple[Message, ...]:
    """Put the images of a foreign row without placeholders before its last message."""
    # InternVL does the same.
    if any(IMAGE_PLACEHOLDER in message["content"] for message in messages) or not messages:
        return messages
    content = f"{IMAGE_PLACEHOLDER}\n" * images + messages[-1]["content"]
    return (*messages[:-1], {**messages[-1], "content": content})


def _image_paths(value: object) -> list[str]:
    if value is None or value == "":
        return []
    paths = []
    for item in value if isinstance(value, list) else [value]:
        path = item.get("path") or item.get("image") if isinstance(item, dict) else item
        if not isinstance(path, str):
            raise SampleError(
                f"an image must be a path or an object with one under 'path' or 'image', got {item!r:.80}"
            )
        paths.append(path)
    return paths


def _load_image(folder: Path, name: str) -> tuple[str, bytes]:
    path = folder / name
    if not path.is_file():
        raise SampleError(f"image {path} does not exist")
    return storable_image(path.read_bytes(), str(path))
