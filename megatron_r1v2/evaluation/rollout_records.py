"""Rollouts for people: lines of `rollouts.jsonl`, each with its picture; training and evaluation share this."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from PIL import Image

from megatron_r1v2.resilience.files import atomic_file
from megatron_r1v2.rewards.claims import judge_claims
from megatron_r1v2.types import Prompt, ScoredRollout

# Twelve tiles of 448 pixels are over a megabyte as PNG; a report shows many pictures, each a few centimetres wide.
MAX_PICTURE_SIDE = 448


class RolloutRecord(TypedDict):
    """A line of `rollouts.jsonl`."""

    step: int
    """The training step, or the optimizer steps behind the evaluated weights."""
    prompt_key: str
    question: str
    messages: NotRequired[list[dict[str, str]]]
    """The whole prompt, where there is more to it than the question."""
    answer: str
    """The reference; empty where own functions judge without one."""
    text: str
    rewards: dict[str, float]
    total: float
    model_score: float | None
    advantage: float
    correct: bool
    claims: list[list[str | bool | None]]
    """(name, value, verdict): true, contradicted, or beyond the facts."""
    finish_reason: str
    response_tokens: int | None
    """The stop token included; None: an endpoint did not say."""
    image_png: str | None
    """Base64; None: a text-only prompt, or the picture is in another line."""


def rollout_record(
    step: int, prompt: Prompt, scored: ScoredRollout, *, advantage: float, picture: bool = True
) -> RolloutRecord:
    """Return one line of `rollouts.jsonl`.

    Args:
        step: the training step, or that of the evaluated weights.
        advantage: as trained with; 0 in an evaluation.
    """
    verdicts = judge_claims(scored.claims, prompt.facts)
    record: RolloutRecord = {
        "step": step,
        "prompt_key": prompt.key,
        "question": question(prompt.messages),
        "answer": prompt.answer or "",
        "text": scored.text,
        "rewards": dict(scored.rewards),
        "total": scored.total,
        "model_score": scored.model_score,
        "advantage": advantage,
        "correct": scored.rule_correct,
        "claims": [[name, value, verdict] for (name, value), verdict in zip(scored.claims, verdicts, strict=True)],
        "finish_reason": scored.rollout.finish_reason,
        "response_tokens": len(scored.rollout.token_ids),
        "image_png": picture_base64(prompt) if picture else None,
    }
    if len(prompt.messages) > 1:
        record["messages"] = [dict(message) for message in prompt.messages]
    return record


def write_rollouts(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Write a whole file of rollout lines.

    Args:
        path: for example `RUN/evaluation-after.rollouts.jsonl`; its folder is made when it is not there.
    """
    with atomic_file(path) as file:
        file.writelines(json.dumps(record, allow_nan=False).encode() + b"\n" for record in records)


def question(messages: Sequence[Mapping[str, str]]) -> str:
    """Return the text of the last user message, without image marks."""
    contents = [message["content"] for message in messages if message["role"] == "user"]
    return contents[-1].replace("<image>", "").strip() if contents else ""


def picture_base64(prompt: Prompt) -> str | None:
    """Return the prompt's tiles put together, as a PNG in base64 of at most `MAX_PICTURE_SIDE`; None without tiles."""
    if prompt.modality == "text":
        return None
    num_images = sum(message["content"].count("<image>") for message in prompt.messages)
    picture_CHW = assemble_tiles(prompt.tiles_TCHW, one_image=num_images <= 1)
    return _small_png(Image.fromarray(picture_CHW.permute(1, 2, 0).contiguous().cpu().numpy()))


def images_base64(images: Sequence[Image.Image]) -> str | None:
    """Return images side by side, as a PNG in base64 of at most `MAX_PICTURE_SIDE`; None without images."""
    if not images:
        return None
    for image in images:
        image.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
    row = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width
    return _small_png(row)


def _small_png(image: Image.Image) -> str:
    image.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")


def assemble_tiles(tiles_TCHW: torch.Tensor, *, one_image: bool) -> torch.Tensor:
    """Put tiles together to the picture that they were cut from.

    With more than one tile of an image the last one is its thumbnail. A prompt does not say in how many rows an image
    was cut, but its thumbnail shows it: of all grids, the one that looks most like the thumbnail when shrunk is taken.

    Args:
        tiles_TCHW: uint8 [T, 3, height, width], T >= 1, in row order.
        one_image: False for tiles of several images, which are put in one row, thumbnails and all.

    Returns:
        uint8 [3, rows x height, columns x width].
    """
    if not one_image or len(tiles_TCHW) == 1:
        return _grid(tiles_TCHW, rows=1)
    # Float: the difference of two uint8 wraps around.
    cut_TCHW, thumbnail_CHW = tiles_TCHW[:-1], tiles_TCHW[-1].float()
    pictures = [_grid(cut_TCHW, rows=rows) for rows in range(1, len(cut_TCHW) + 1) if len(cut_TCHW) % rows == 0]
    size = (thumbnail_CHW.shape[1], thumbnail_CHW.shape[2])

    def difference(picture_CHW: torch.Tensor) -> float:
        shrunk_1CHW = torch.nn.functional.interpolate(picture_CHW.float()[None], size=size, mode="area")
        return float((shrunk_1CHW[0] - thumbnail_CHW).abs().mean())

    return min(pictures, key=difference)


def _grid(tiles_TCHW: torch.Tensor, *, rows: int) -> torch.Tensor:
    """Return the tiles in a grid of so many rows, [3, rows x height, columns x width]."""
    num_tiles, channels, height, width = tiles_TCHW.shape
    columns = num_tiles // rows
    grid_RKCHW = tiles_TCHW.reshape(rows, columns, channels, height, width)
    return grid_RKCHW.permute(2, 0, 3, 1, 4).reshape(channels, rows * height, columns * width)
