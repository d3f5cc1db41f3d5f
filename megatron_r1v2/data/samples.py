"""Samples of a data set: the record `KEY.json`, the images `KEY.0.png`, and the checks of both.

    {"schema": 1, "messages": [{"role": "user", "content": "<image>\\nWhat is left + right?"}], "answer": "8",
     "answer_type": "numeric", "facts": {"left": "3", "right": "5"}, "images": ["0.png"]}

`facts` and `images` may be left out. `response` (supervised data), `chosen`, `rejected` and `margin` (preference data)
and `source` are optional; `answer` may be empty only in a sample with a `response` or a `chosen`, or with an
`answer_type` of null, which says that a reward of one's own judges without. `alternatives` lists further right answers,
`tolerances` bounds the distance of numbers from the answer, and `metadata` (names to text) groups the results of an
evaluation. `unclosed_think` is true where a pair was accepted with a response that never ends its reasoning.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from megatron_r1v2.types import AnswerType

JsonObject = dict[str, Any]
"""A decoded JSON object whose fields are not checked yet."""

SCHEMA_VERSION = 1
IMAGE_PLACEHOLDER = "<image>"
THINK, THINK_END = "<think>", "</think>"
IMAGE_EXTENSIONS = ("png", "jpg", "webp")
ROLES = ("system", "user", "assistant")

# Energon splits a name at its first dot, ustar allows 100 characters, and a leading "__" means metadata.
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
_IMAGE_NAME = re.compile(r"[0-9]+\.(" + "|".join(IMAGE_EXTENSIONS) + ")")
_REQUIRED = {"schema", "messages", "answer", "answer_type"}
_OPTIONAL_TEXT = ("response", "chosen", "rejected", "source")
_KNOWN = _REQUIRED | {
    "facts", "images", "margin", "alternatives", "tolerances", "metadata", "unclosed_think", *_OPTIONAL_TEXT,
}  # fmt: skip


class DataError(ValueError):
    """An error of the data set, which all ranks meet at the same place: they read the same stream."""


class SampleError(DataError):
    """An error of one sample; the rest of the data set may be usable."""


@dataclass(frozen=True)
class ShardSample:
    """A checked sample.

    Example: key "digits-000017", one user message with one "<image>", answer "8", images {"0.png": b"..."}.
    """

    key: str
    """Unique in the data set: letters, digits, "_" and "-", at most 80."""
    messages: tuple[Mapping[str, str], ...]
    answer: str
    answer_type: AnswerType | None
    """None: there is no answer, and a reward of one's own judges without."""
    images: Mapping[str, bytes] = field(default_factory=dict)
    """Encoded images by name ("0.png"), in the order of the "<image>" placeholders."""
    facts: Mapping[str, str] = field(default_factory=dict)
    response: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    margin: float | None = None
    """Reward of `chosen` minus reward of `rejected`."""
    source: str | None = None
    alternatives: tuple[str, ...] = ()
    """Further right answers."""
    tolerances: tuple[float, ...] = ()
    """Absolute distances of a number from `answer`: one for all of its parts (separated by ", ") or one for each."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The groups of an evaluation that the sample is in, such as {"benchmark": "MMMU", "subject": "Art"}."""
    unclosed_think: bool = False
    """Its pair was accepted though a response of it does not end its reasoning by `</think>`."""


def check_key(key: str) -> None:
    """Check that a key can name files in a shard.

    Raises:
        SampleError: the key has other characters than letters, digits, "_" and "-", or is too long.
    """
    if not _KEY.fullmatch(key):
        raise SampleError(
            f"sample key {key!r}: accepted are 1 to 80 letters, digits, '_' and '-', the first a letter or digit"
        )


def image_name(index: int, extension: str) -> str:
    """Return the name of an image in a shard, without the key: "0.png" for the first image of a sample."""
    return f"{index}.{extension}"


def encode_record(sample: ShardSample) -> bytes:
    """Encode the JSON part of a sample, after the checks of `parse_sample`.

    Returns:
        UTF-8 JSON; equal samples give equal bytes.

    Raises:
        SampleError: `parse_sample` would refuse the sample.
    """
    record: JsonObject = {
        "schema": SCHEMA_VERSION,
        "messages": [dict(message) for message in sample.messages],
        "answer": sample.answer,
        "answer_type": sample.answer_type,
        "facts": dict(sample.facts),
        "images": list(sample.images),
    }
    # Absent and empty fields are left out: a field that is added to the schema later does not change older files.
    for name in (*_OPTIONAL_TEXT, "margin"):
        value = getattr(sample, name)
        if value is not None:
            record[name] = value
    if sample.alternatives:
        record["alternatives"] = list(sample.alternatives)
    if sample.tolerances:
        record["tolerances"] = list(sample.tolerances)
    if sample.metadata:
        record["metadata"] = dict(sample.metadata)
    if sample.unclosed_think:
        record["unclosed_think"] = True
    _check_record(record, sample.key)
    check_key(sample.key)
    return json.dumps(record, ensure_ascii=False, sort_keys=True).encode()


def parse_sample(key: str, parts: Mapping[str, bytes]) -> ShardSample:
    """Make a sample of the files that a shard holds under its key.

    Args:
        parts: the contents of the files by name without the key: "json" and the images that it names.

    Returns:
        The sample, with images that are still encoded.

    Raises:
        SampleError: the JSON or a named image is missing, or the record violates the schema.
    """
    if "json" not in parts:
        raise SampleError(
            f"sample {key!r}: no {key}.json in the shard (found: {', '.join(sorted(parts)) or 'nothing'})"
        )
    try:
        record = json.loads(parts["json"])
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SampleError(f"sample {key!r}: {key}.json is not JSON: {error}") from error
    _check_record(record, key)
    names = record.get("images", [])
    missing = [name for name in names if name not in parts]
    if missing:
        raise SampleError(f"sample {key!r}: image {key}.{missing[0]} is not in the shard")
    return ShardSample(
        key=key,
        messages=tuple(record["messages"]),
        answer=record["answer"],
        answer_type=record["answer_type"],
        images={name: parts[name] for name in names},
        facts=record.get("facts", {}),
        margin=record.get("margin"),
        alternatives=tuple(record.get("alternatives", ())),
        tolerances=tuple(record.get("tolerances", ())),
        metadata=record.get("metadata", {}),
        unclosed_think=bool(record.get("unclosed_think")),
        **{name: record.get(name) for name in _OPTIONAL_TEXT},
    )


def count_placeholders(messages: Iterable[Mapping[str, str]]) -> int:
    """Count the "<image>" placeholders in chat messages."""
    return sum(message["content"].count(IMAGE_PLACEHOLDER) for message in messages)


def _check_record(record: object, key: str) -> None:
    if not isinstance(record, dict):
        raise SampleError(f"sample {key!r}: expected a JSON object, got {type(record).__name__}")
    if record.get("schema") != SCHEMA_VERSION:
        raise SampleError(
            f"sample {key!r}: schema is {record.get('schema')!r}, accepted is {SCHEMA_VERSION}; "
            "make the shards again with python -m megatron_r1v2 prepare"
        )
    absent, unknown = sorted(_REQUIRED - set(record)), sorted(set(record) - _KNOWN)
    if absent or unknown:
        what = f"lacks {', '.join(absent)}" if absent else f"has the unknown field {unknown[0]!r}"
        raise SampleError(f"sample {key!r}: the record {what}; known fields: {', '.join(sorted(_KNOWN))}")
    _check_messages(record["messages"], key)
    _check_values(record, key)
    _check_images(record, key)


def _check_messages(messages: object, key: str) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise SampleError(f"sample {key!r}: messages must be a list with at least one message, got {messages!r}")
    for message in messages:
        if (
            not isinstance(message, dict)
            or set(message) != {"role", "content"}
            or message["role"] not in ROLES
            or not isinstance(message["content"], str)
        ):
            raise SampleError(
                f"sample {key!r}: a message is {{'role': one of {', '.join(ROLES)}, 'content': text}}, got {message!r}"
            )
    if messages[-1]["role"] != "user":
        raise SampleError(
            f"sample {key!r}: the last message must be the user's, got role {messages[-1]['role']!r}; "
            "a reference answer goes into 'response'"
        )


def _check_values(record: JsonObject, key: str) -> None:
    accepted = get_args(AnswerType)
    unjudged = record["answer_type"] is None and record["answer"] == ""
    if record["answer_type"] not in accepted and not unjudged:
        raise SampleError(
            f"sample {key!r}: answer_type is {record['answer_type']!r}, accepted are {', '.join(accepted)}"
        )
    for name in ("answer", *_OPTIONAL_TEXT):
        if name in record and not isinstance(record[name], str):
            raise SampleError(f"sample {key!r}: {name} must be text, got {record[name]!r}")
    if not record["answer"].strip() and not (unjudged or record.get("response") or record.get("chosen")):
        raise SampleError(
            f"sample {key!r}: answer is empty; only a sample with a 'response' or a 'chosen' may have none"
        )
    margin = record.get("margin", 0.0)
    if not _is_number(margin):
        raise SampleError(f"sample {key!r}: margin must be a number, got {margin!r}")
    tolerances = record.get("tolerances", [])
    if not isinstance(tolerances, list) or not all(_is_number(t) and t >= 0 for t in tolerances):
        raise SampleError(f"sample {key!r}: tolerances must be a list of numbers from 0, got {tolerances!r}")
    for name in ("facts", "metadata"):
        mapping = record.get(name, {})
        if not isinstance(mapping, dict) or not all(isinstance(value, str) for value in mapping.values()):
            raise SampleError(f"sample {key!r}: {name} must map names to text, got {mapping!r}")
    others = record.get("alternatives", [])
    if not isinstance(others, list) or not all(isinstance(other, str) and other.strip() for other in others):
        raise SampleError(f"sample {key!r}: alternatives must be a list of texts that are not empty, got {others!r}")


def _is_number(value: object) -> bool:
    # A bool is an int in Python, and an int may be too large for a float; NaN is smaller than nothing.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < sys.float_info.max


def _check_images(record: JsonObject, key: str) -> None:
    images = record.get("images", [])
    if not isinstance(images, list) or not all(isinstance(n, str) and _IMAGE_NAME.fullmatch(n) for n in images):
        raise SampleError(
            f"sample {key!r}: images must be a list of names like '0.png' "
            f"({', '.join(IMAGE_EXTENSIONS)}), got {images!r}"
        )
    if len(set(images)) != len(images):
        raise SampleError(f"sample {key!r}: images names one file twice: {images!r}")
    placeholders = count_placeholders(record["messages"])
    if placeholders != len(images):
        raise SampleError(
            f"sample {key!r}: the messages have {placeholders} {IMAGE_PLACEHOLDER} and there are {len(images)} images; "
            f"each image needs its own {IMAGE_PLACEHOLDER}"
        )
