"""Images of rows, however they are given: paths, bytes, data URLs, base64, and structs of these."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_r1v2.data.images import storable_image
from megatron_r1v2.data.messages import data_url_type, decode_base64, decode_data_url
from megatron_r1v2.data.samples import SampleError

# PNG, JPEG, WebP, GIF; a JPEG's looks like an absolute path.
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD")
_SHORTEST_BASE64 = 60
_MEDIA_NAME = re.compile(
    r"\S[^\n]{0,300}\.(png|jpe?g|webp|gif|bmp|tiff?|ppm|pgm|mp4|avi|mov|webm|mkv|wav|mp3|flac|npy)", re.I
)
_NESTED = ("image", "image_url", "url", "path")


def as_list(value: object) -> list[object]:
    """Return a column's images as a list; empty where there are none."""
    if value is None or value in ("", [], ()):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def load_image(value: object, folder: Path) -> tuple[str, bytes]:
    """Return the extension and the bytes of an image to store.

    Args:
        value: a path below the folder, bytes, a data URL, base64, or an object with one of these under bytes, path,
            image, image_url or url.

    Raises:
        SampleError: it is none of these, or it cannot be decoded.
    """
    if isinstance(value, bytes):
        return storable_image(value, f"of {len(value)} bytes in the row")
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes):
            return storable_image(value["bytes"], str(value.get("path") or "in the row"))
        inner = next((value[name] for name in _NESTED if value.get(name)), None)
        if inner is not None:
            return load_image(inner, folder)
    if not isinstance(value, str):
        raise SampleError(
            f"an image must be a path or an object with one under 'path' or 'image', got {value!r:.80}; "
            "bytes, data URLs and base64 are accepted too"
        )
    if data_url_type(value) is not None:
        return _decode(lambda: decode_data_url(value), value[:40])
    if value.startswith(_BASE64_STARTS) and len(value) >= _SHORTEST_BASE64 and not _is_file(folder / value):
        return _decode(lambda: decode_base64(value.encode()), value[:20])
    if re.match(r"(https?|s3|gs|hf)://", value):
        raise SampleError(f"image {value:.100} is on the network, and nothing is downloaded; give a file")
    path = folder / value.removeprefix("file://")
    if not _is_file(path):
        raise SampleError(f"image {path!s:.300} does not exist; paths are relative to --images FOLDER")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SampleError(f"image {path} cannot be read: {error}") from error
    return storable_image(data, str(path))


def is_media(value: object) -> bool:
    """Return whether a value of a column holds or names an image, a video or a sound, at any depth."""
    if isinstance(value, bytes):
        return True
    if isinstance(value, str):
        return bool(data_url_type(value[:300]) is not None or _MEDIA_NAME.fullmatch(value[:320].strip()))
    if isinstance(value, Mapping):
        return any(is_media(item) for item in value.values())
    return isinstance(value, list | tuple) and any(is_media(item) for item in value)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a null character
        return False


def _decode(decode: Callable[[], bytes], shown: str) -> tuple[str, bytes]:
    try:
        data = decode()
    except ValueError as error:
        raise SampleError(f"image {shown!r}...: not base64: {error}") from error
    return storable_image(data, f"{shown}...")
