"""Images: decoding, storing, and the tiles of InternVL (the grid nearest in aspect ratio, and a thumbnail)."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Sequence
from typing import IO

import numpy
import torch
from PIL import ExifTags, Image

from megatron_r1v2.data.pixels import describe_other_content, is_plain, to_rgb
from megatron_r1v2.data.samples import SampleError, image_name

_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
# EXIF orientations that swap width and height.
_LYING = (5, 6, 7, 8)
# The errors that Pillow raises for broken files of these formats; any other error is a bug of ours and must surface.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode an image to its end, so that a truncated file is an error here, by the rule of `pixels.to_rgb`.

    Args:
        name: its name in an error.

    Returns:
        An RGB image.

    Raises:
        SampleError: the file cannot be decoded to its end.
    """
    if other := describe_other_content(data):
        raise SampleError(f"image {name} {other} ({len(data)} bytes)")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return to_rgb(image)
    except _DECODE_ERRORS as error:
        raise SampleError(f"image {name}: cannot be decoded ({len(data)} bytes): {error}") from error


def storable_image(data: bytes, name: str) -> tuple[str, bytes]:
    """Check an encoded image, and encode it as PNG unless it is a PNG, JPEG or WebP that all readers show alike.

    Args:
        name: its name in an error.

    Returns:
        One of `IMAGE_EXTENSIONS`, and the encoded image.

    Raises:
        SampleError: the file cannot be decoded to its end.
    """
    image = decode_image(data, name)
    with Image.open(io.BytesIO(data)) as encoded:
        # Servers and judges get the stored bytes: what is transparent, turned or of 16 bits would differ from here.
        extension = _EXTENSIONS.get(encoded.format or "") if is_plain(encoded) else None
    if extension:
        return extension, data
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "png", buffer.getvalue()


def image_size(file: IO[bytes], name: str) -> tuple[int, int]:
    """Return the width and height of an upright image; of its file the beginning is read.

    Raises:
        SampleError: it cannot be read.
    """
    try:
        with Image.open(file) as image:
            # Without this look, Pillow would decode a PNG to its end for EXIF behind the pixels.
            lies = "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) in _LYING
            return (image.height, image.width) if lies else (image.width, image.height)
    except _DECODE_ERRORS as error:
        raise SampleError(f"image {name}: cannot be decoded: {error}") from error


def name_images(encoded: Sequence[tuple[str, bytes]]) -> dict[str, bytes]:
    """Return images from `storable_image` by their names in a shard, in order of appearance."""
    return {image_name(index, extension): data for index, (extension, data) in enumerate(encoded)}


def tile_limit(max_tiles: int, num_images: int) -> int:
    """Return the most tiles of each image of a prompt: max(1, max_tiles // num_images), which is InternVL's rule."""
    return max(1, max_tiles // num_images)


@functools.lru_cache(maxsize=16)
def _grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """List all grids (columns, rows) of at most `max_tiles` tiles, by number of tiles."""
    sides = range(1, max_tiles + 1)
    return tuple(
        sorted(((c, r) for c in sides for r in sides if c * r <= max_tiles), key=lambda grid: grid[0] * grid[1])
    )


def choose_grid(width: int, height: int, *, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """Choose the grid of tiles that an image is cut into.

    The grid nearest to the image's aspect ratio wins. Of two equally near ones, such as 2x1 and 4x2, the larger wins
    only if the image has more than half of its pixels.

    Args:
        max_tiles: the most tiles, thumbnail not counted.

    Returns:
        (columns, rows).

    Raises:
        ValueError: a size is below one.
    """
    if min(width, height, tile_size, max_tiles) < 1:
        raise ValueError(
            "image tiling needs sizes of at least 1, got "
            f"width {width}, height {height}, tile_size {tile_size}, max_tiles {max_tiles}"
        )
    # The order of the grids and both comparisons are those of InternVL: other grids would be other pixels than the
    # model was trained on.
    aspect_ratio = width / height
    best, best_difference = (1, 1), float("inf")
    for columns, rows in _grids(max_tiles):
        difference = abs(aspect_ratio - columns / rows)
        enough_pixels = width * height > 0.5 * tile_size * tile_size * columns * rows
        if difference < best_difference or (difference == best_difference and enough_pixels):
            best, best_difference = (columns, rows), difference
    return best


def count_tiles(size: tuple[int, int], *, tile_size: int, max_tiles: int) -> int:
    """Return the number of tiles that an image is cut into, its thumbnail included."""
    columns, rows = choose_grid(*size, tile_size=tile_size, max_tiles=max_tiles)
    return columns * rows + (columns * rows > 1)


def tile_image(image: Image.Image, *, tile_size: int, max_tiles: int) -> torch.Tensor:
    """Cut an image into tiles.

    Args:
        tile_size: the pixels along each side of a tile: the model's image size.
        max_tiles: the most tiles, thumbnail not counted.

    Returns:
        uint8 [T, 3, tile_size, tile_size]: the tiles row by row, and a thumbnail if they are more than one.

    Raises:
        ValueError: a size is below one.
    """
    image = image.convert("RGB")
    columns, rows = choose_grid(image.width, image.height, tile_size=tile_size, max_tiles=max_tiles)
    # The image is stretched to the grid, as in InternVL; the grid was chosen so that this distorts little.
    canvas = image.resize((columns * tile_size, rows * tile_size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(numpy.array(canvas))
    tiles_TCHW = (
        pixels.view(rows, tile_size, columns, tile_size, 3)
        .permute(0, 2, 4, 1, 3)
        .reshape(rows * columns, 3, tile_size, tile_size)
    )
    if rows * columns == 1:
        return tiles_TCHW.contiguous()
    thumbnail = torch.from_numpy(numpy.array(image.resize((tile_size, tile_size), Image.Resampling.BICUBIC)))
    return torch.cat([tiles_TCHW, thumbnail.permute(2, 0, 1)[None]]).contiguous()
