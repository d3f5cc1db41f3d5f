"""Any image as 8-bit RGB, by one rule for all formats: upright, opaque, its whole range from black to white.

Pillow's own conversion clips 16-bit and float pixels at 255, which makes them white, and leaves the ground of
transparent ones black.
"""

from __future__ import annotations

import re

import numpy
import numpy.typing
from PIL import ExifTags, Image, ImageOps

_Values = numpy.typing.NDArray[numpy.float32]
_Pixels = numpy.typing.NDArray[numpy.uint8]

_FULL_SCALES = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))
"""White of images with whole numbers: cameras and scanners store 10, 12 and 14 bits in 16."""
_OTHER_CONTENT = (
    (re.compile(rb"\s*\Z"), "is empty; copy or download it again"),
    (re.compile(rb"version \S*git-lfs\."), "is a Git LFS pointer, not the image; fetch it with git lfs pull"),
    (re.compile(rb"\S*/annex/objects/\S*\s*\Z"), "is a git-annex pointer, not the image; fetch it with git annex get"),
    (re.compile(rb"\s*<(!doctype\s+html|html|head|body)\b", re.I), "is an HTML page, not an image; download it again"),
    (re.compile(rb"\s*(<\?xml|<svg)", re.I), "is XML (an error of a server, or SVG), not a PNG, JPEG or the like"),
    (re.compile(rb'\s*\{\s*"'), "is JSON, not an image; download it again"),
    (re.compile(rb"%PDF-"), "is a PDF; render the page as PNG first"),
)


def describe_other_content(data: bytes) -> str | None:
    """Return a sentence about a file that is known to be no image, such as the page of a failed download."""
    head = data[:1024].removeprefix(b"\xef\xbb\xbf")
    return next((sentence for pattern, sentence in _OTHER_CONTENT if pattern.match(head)), None)


def is_plain(image: Image.Image) -> bool:
    """Return whether every reader shows the same pixels: 8 bits a channel, opaque, and not to be turned."""
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return not turned and not _has_one_wide_channel(image) and not _is_transparent(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image upright, scale it to 8 bits, and lay it on white.

    Whole numbers: 0 is black, and white is the smallest full scale of 8, 10, 12, 14 or 16 bits that the image stays
    within, beyond 16 bits the largest value. Floats from 0 to 1: 0 is black and 1 is white. Other floats, negative
    numbers, and images that would be one colour otherwise: the smallest is black and the largest white.

    Raises:
        ValueError: it would come out as one colour although it has several, or a pixel is no number.
    """
    _refuse_narrow_colours(image)
    image.load()  # Pillow itself turns a TIFF upright, in this call
    image = ImageOps.exif_transpose(image)
    if _has_one_wide_channel(image):
        return Image.fromarray(_eight_bits(numpy.asarray(image).astype(numpy.float32))).convert("RGB")
    if not _is_transparent(image):
        return image.convert("RGB")
    layer = image.convert("RGBA")
    rgb = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer).convert("RGB")
    if _is_one_colour(rgb) and not _is_one_colour(layer):
        raise ValueError("it is all white once its transparency is laid on white; lay it on another colour first")
    return rgb


def _has_one_wide_channel(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def _is_transparent(image: Image.Image) -> bool:
    return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255)


def _is_one_colour(image: Image.Image) -> bool:
    return image.getcolors(maxcolors=1) is not None


def _eight_bits(values_HW: _Values) -> _Pixels:
    low, high = float(values_HW.min()), float(values_HW.max())
    if not numpy.isfinite(values_HW).all():
        raise ValueError("some of its pixels are NaN or infinite; replace them by numbers")
    whole = bool((values_HW == numpy.rint(values_HW)).all())
    if low >= 0 and high <= 1:
        black, white = 0.0, 1.0
    elif low >= 0 and whole:
        black, white = 0.0, float(next((scale for scale in _FULL_SCALES if high <= scale), high))
    else:
        black, white = low, high
    pixels_HW = _scale(values_HW, black, white)
    if low < high and pixels_HW.min() == pixels_HW.max():
        pixels_HW = _scale(values_HW, low, high)
    return pixels_HW


def _scale(values_HW: _Values, black: float, white: float) -> _Pixels:
    if black == white:  # one colour, which no range says anything about
        return numpy.full(values_HW.shape, 127, numpy.uint8)
    pixels_HW: _Pixels = numpy.rint((values_HW - black) / (white - black) * 255).astype(numpy.uint8)
    return pixels_HW


def _refuse_narrow_colours(image: Image.Image) -> None:
    """Refuse 12 bits in 16 a colour, which Pillow's upper 8 bits would leave almost black and in 16 steps."""
    # How the pixels are stored is known until they are loaded: "RGB;16B", where the mode says RGB.
    wide = any(";16" in str(tile.args) for tile in getattr(image, "tile", ()))
    if wide and len(image.getbands()) > 1 and numpy.asarray(image.convert("RGB")).max() < 2**4:
        raise ValueError(
            "its colours have 16 bits, of which at most the lower 12 are used; scale them to the whole range first"
        )
