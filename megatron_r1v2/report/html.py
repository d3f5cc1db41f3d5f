"""The pages as files: their templates, the pictures in them, and how they are written."""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, Template
from PIL import Image

from megatron_r1v2.resilience.files import write_file

MAX_SIDE = 448
"""As in the lines of rollouts.jsonl; shown smaller until it is clicked."""
MAX_BYTES = 20_000_000
SMALL_SIDE = 128


@dataclass(frozen=True)
class Picture:
    """An image ready for an `<img>` element."""

    uri: str
    width: int
    height: int
    pixelated: bool
    """It is so small that it is shown enlarged, with hard edges."""


def template(name: str) -> Template:
    """Return a template of this folder, which escapes the values that it is given."""
    environment = Environment(
        loader=PackageLoader("megatron_r1v2.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


def write_page(path: Path, page: str) -> Path:
    """Write a page of HTML and return its path."""
    # A model can emit half a surrogate pair, which UTF-8 cannot hold.
    write_file(path, page.encode("utf-8", errors="replace"))
    return path


def data_uri(png: object) -> Picture | None:
    """Turn the base64 image of a rollout into a small picture that stands in the page itself.

    It is decoded, made small and encoded again, so that only pixels get through.

    Args:
        png: base64 text; anything else gives no picture.
    """
    if not isinstance(png, str) or not png or len(png) > MAX_BYTES:
        return None
    try:
        with Image.open(io.BytesIO(base64.b64decode(png, validate=True))) as file:
            file.thumbnail((MAX_SIDE, MAX_SIDE))
            image = file.convert("RGB")
            image.info.clear()  # a comment or a colour profile would be saved with the pixels
    except (binascii.Error, ValueError, OSError, SyntaxError, Image.DecompressionBombError):
        return None
    small = max(image.size) <= SMALL_SIDE
    buffer = io.BytesIO()
    # JPEG keeps a page of photographs below its size limit; digits a few pixels wide must stay exact.
    if small:
        image.save(buffer, format="PNG")
    else:
        image.save(buffer, format="JPEG", quality=80)
    kind = "png" if small else "jpeg"
    scale = max(1, 2 * SMALL_SIDE // max(image.size)) if small else 1
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    return Picture(uri=uri, width=image.width * scale, height=image.height * scale, pixelated=small)
