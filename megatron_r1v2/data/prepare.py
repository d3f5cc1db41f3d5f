"""Rows of JSONL and their images, read into checked samples: the work of `r1v2 prepare`."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_r1v2.data.images import decode_image
from megatron_r1v2.data.samples import (
    IMAGE_PLACEHOLDER,
    SCHEMA_VERSION,
    SampleError,
    ShardSample,
    check_key,
    encode_record,
    image_name,
)
from megatron_r1v2.types import AnswerType

_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


def read_samples(
    path: str | Path,
    images: str | Path,
    *,
    answer_type: AnswerType = "math",
    report: Callable[[str], None] | None = None,
) -> Iterator[ShardSample]:
    """Read and check the rows of a JSONL file.

    Args:
        path: One JSON object a line; empty lines are passed over.
        images: Folder that image paths are relative to.
        answer_type: For rows that do not say how their answer is compared (verl, MMPR).
        report: Called with the message of each bad row, which is then left out; without it the first one is raised.

    Yields:
        Checked samples, their images decoded once.

    Raises:
        ValueError: If the file cannot be read as JSONL, or, without `report`, for the first bad row, with its line.
    """
    source = Path(path)
    check_inputs(source, Path(images))
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
                if report is None:
                    raise SampleError(message) from error
                report(message)
                continue
            lines_by_key[sample.key] = number
            yield sample


def check_inputs(source: Path, images: Path) -> None:
    """Refuse a file that is not JSONL and a folder that does not exist.

    Raises:
        ValueError: naming what is wrong.
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
    encode_record(sample)  # the schema is checked there
    return sample


def _own_fields(row: Mapping[str, Any]) -> dict[str, Any]:
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


def _mmpr_fields(row: Mapping[str, Any], answer_type: AnswerType) -> dict[str, Any]:
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


def _verl_fields(row: Mapping[str, Any], answer_type: AnswerType) -> dict[str, Any]:
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


def _object(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SampleError(f"{name} must be an object, got {value!r}")
    return value


def _messages(messages: object) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("content"), str) for message in messages
    ):
        raise SampleError(f"expected a list of messages with a text as content, got {messages!r}")
    return tuple(dict(message) for message in messages)


def _with_placeholders(messages: tuple[dict[str, Any], ...], images: int) -> tuple[dict[str, Any], ...]:
    """Put images before the last message where a foreign row does not say where they belong, as InternVL does."""
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


def storable_image(data: bytes, name: str) -> tuple[str, bytes]:
    """Check an encoded image, and encode it as PNG unless it is PNG, JPEG or WebP.

    Args:
        data: The encoded file.
        name: What to call it in an error.

    Returns:
        One of `IMAGE_EXTENSIONS`, and the encoded image.

    Raises:
        SampleError: If it cannot be decoded to its end.
    """
    image = decode_image(data, name)
    with Image.open(io.BytesIO(data)) as encoded:
        extension = _EXTENSIONS.get(encoded.format or "")
    if extension:
        return extension, data
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "png", buffer.getvalue()


def name_images(encoded: Sequence[tuple[str, bytes]]) -> dict[str, bytes]:
    """Name images as a shard does.

    Args:
        encoded: From `storable_image`, in order of appearance.
    """
    return {image_name(index, extension): data for index, (extension, data) in enumerate(encoded)}
