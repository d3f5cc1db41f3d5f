"""Chat messages in the format of OpenAI-style servers, with images as base64 data URLs."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from urllib.parse import unquote_to_bytes

from megatron_r1v2.data.samples import IMAGE_PLACEHOLDER, JsonObject

_DATA_URL = re.compile(r"\s*data:([^;,]*)((?:;[^;,]*)*),", re.IGNORECASE)
# The first bytes of a file tell its format; names in a request cannot be trusted.
_SIGNATURES = ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpeg"), (b"RIFF", "webp"))


def openai_messages(messages: Sequence[Mapping[str, str]], images: Sequence[bytes]) -> list[JsonObject]:
    """Replace the "<image>" placeholders of messages by images.

    Args:
        messages: chat messages, {"role": ..., "content": ...}.
        images: the encoded images, in order of appearance.

    Returns:
        Messages whose content is text, or a list of text and image_url parts in a message with an image.

    Raises:
        ValueError: placeholders and images differ in number, or an image is of an unknown format.
    """
    remaining = iter(images)
    result: list[JsonObject] = []
    placeholders = sum(message["content"].count(IMAGE_PLACEHOLDER) for message in messages)
    if placeholders != len(images):
        raise ValueError(
            f"the messages have {placeholders} {IMAGE_PLACEHOLDER} and there are {len(images)} encoded images"
        )
    for message in messages:
        text, *rest = message["content"].split(IMAGE_PLACEHOLDER)
        if not rest:
            result.append(dict(message))
            continue
        parts: list[JsonObject] = [{"type": "text", "text": text}] if text else []
        for piece in rest:
            parts.append({"type": "image_url", "image_url": {"url": data_url(next(remaining))}})
            if piece:
                parts.append({"type": "text", "text": piece})
        result.append({"role": message["role"], "content": parts})
    return result


def data_url(image: bytes) -> str:
    """Return an encoded image (PNG, JPEG or WebP) as a base64 data URL.

    Raises:
        ValueError: the image has another format.
    """
    return f"data:image/{image_format(image)};base64,{base64.b64encode(image).decode()}"


def image_format(image: bytes) -> str:
    """Return the format of an encoded image: png, jpeg or webp.

    Raises:
        ValueError: the image has another format.
    """
    for signature, name in _SIGNATURES:
        if image.startswith(signature):
            return name
    raise ValueError(f"an image of {len(image)} bytes is neither PNG, JPEG nor WebP: it begins with {image[:8]!r}")


def data_url_type(text: str) -> str | None:
    """Return the media type that a data URL states, which may be empty; None: the text is not a data URL."""
    head = _DATA_URL.match(text)
    return head[1].strip().lower() if head else None


def decode_data_url(url: str) -> bytes:
    """Return the content of a data URL.

    Base64 may have line breaks, lack its padding, be of the url-safe alphabet or percent-encoded, as clients send it.

    Raises:
        ValueError: the text is no data URL, or its content is not base64 where it says so.
    """
    head = _DATA_URL.match(url)
    if head is None:
        raise ValueError(f"{url[:60]!r} is no data URL; accepted: data:image/png;base64,...")
    content = unquote_to_bytes(url[head.end() :])
    if "base64" not in (parameter.strip().lower() for parameter in head[2].split(";")):
        return content
    return decode_base64(content)


def decode_base64(content: bytes) -> bytes:
    """Decode base64 of either alphabet, with line breaks or without padding.

    Raises:
        ValueError: it is not base64.
    """
    compact = b"".join(content.split()).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    return base64.b64decode(compact + b"=" * (-len(compact) % 4), validate=True)
