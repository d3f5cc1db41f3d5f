"""Questions and images of shards, for `shards.yaml`.

Imports nothing of this package, whose reader of shards needs energon and torch: lm-eval has an environment of its own,
without either. So it opens the tar files itself.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import TypedDict

from datasets import Dataset
from PIL import Image

_PLACEHOLDER = "<image>"


class Row(TypedDict):
    """A question; its images are (path of the shard, offset, length), as text: datasets wants one type in a list."""

    key: str
    question: str
    answer: str
    images: list[list[str]]


def load(shards: str = "", **_: object) -> dict[str, Dataset]:
    """Read the questions; an image is read from its shard when its question is asked.

    Args:
        shards: folder of shards, by `--metadata '{"shards": "FOLDER"}'`; lm-eval passes more, which is ignored.

    Returns:
        {"test": rows of key, question, answer and images: each the shard's path, offset and length}.

    Raises:
        ValueError: no shard, or a sample that lm-eval cannot ask: it sends the images first and then one text.
    """
    paths = sorted(Path(shards).glob("*.tar")) if shards else []
    if not paths:
        raise ValueError(f'there are no shards in {shards!r}; give their folder: --metadata \'{{"shards": "FOLDER"}}\'')
    return {"test": Dataset.from_list([row for path in paths for row in _rows(path)])}


def images(row: Row) -> list[Image.Image]:
    """Return the pictures of a row."""
    found = []
    for path, offset, length in row["images"]:
        with open(path, "rb") as file:
            file.seek(int(offset))
            found.append(Image.open(io.BytesIO(file.read(int(length)))).convert("RGB"))
    return found


def _rows(path: Path) -> list[Row]:
    with tarfile.open(path) as shard:
        members = {member.name: member for member in shard.getmembers()}
        rows: list[Row] = []
        for name in members:
            if not name.endswith(".json"):
                continue
            file = shard.extractfile(name)
            assert file is not None
            key, record = name.removesuffix(".json"), json.loads(file.read())
            pictures = [members[f"{key}.{image}"] for image in record.get("images", ())]
            places = [[str(path), str(picture.offset_data), str(picture.size)] for picture in pictures]
            question = _question(key, record["messages"], len(places))
            rows.append({"key": key, "question": question, "answer": record["answer"], "images": places})
    return rows


def _question(key: str, messages: list[dict[str, str]], num_images: int) -> str:
    text = messages[0]["content"]
    for _ in range(num_images):
        text = text.removeprefix(_PLACEHOLDER).removeprefix("\n")
    if len(messages) > 1 or _PLACEHOLDER in text:
        raise ValueError(
            f"sample {key!r} has several messages, or an image behind text; lm-eval sends one message with its images "
            "first. Evaluate it by python -m megatron_r1v2 evaluate with evaluation.endpoint_url"
        )
    return text
