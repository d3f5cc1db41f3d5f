"""Chat messages as OpenAI-style servers read them, images as base64 data URLs in their places."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_r1v2.data.samples import IMAGE_PLACEHOLDER

_SIGNATURES = ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpeg"), (b"RIFF", "webp"))


def openai_messages(messages: Sequence[Mapping[str, str]], images: Sequence[bytes]) -> list[dict[str, Any]]:
    """Put images where the messages have "<image>".

    Args:
        messages: {"role": ..., "content": ...}.
        images: encoded, in order of appearance.

    Returns:
        Messages whose content is text, or a list of text and image_url parts where there is an image.

    Raises:
        ValueError: placeholders and images differ in number, or an image is of an unknown format.
    """
    waiting = iter(images)
    found: list[dict[str, Any]] = []
    placeholders = sum(message["content"].count(IMAGE_PLACEHOLDER) for message in messages)
    if placeholders != len(images):
        raise ValueError(
            f"the messages have {placeholders} {IMAGE_PLACEHOLDER} and there are {len(images)} encoded images"
        )
    for message in messages:
        text, *rest = message["content"].split(IMAGE_PLACEHOLDER)
        if not rest:
            found.append(dict(message))
            continue
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
        for piece in rest:
            parts.append({"type": "image_url", "image_url": {"url": data_url(next(waiting))}})
            if piece:
                parts.append({"type": "text", "text": piece})
        found.append({"role": message["role"], "content": parts})
    return found


def data_url(image: bytes) -> str:
    """Return an encoded image as a base64 data URL.

    Args:
        image: PNG, JPEG or WebP.

    Raises:
        ValueError: it is none of these.
    """
    for signature, name in _SIGNATURES:
        if image.startswith(signature):
            return f"data:image/{name};base64,{base64.b64encode(image).decode()}"
    raise ValueError(f"an image of {len(image)} bytes is neither PNG, JPEG nor WebP: it begins with {image[:8]!r}")
