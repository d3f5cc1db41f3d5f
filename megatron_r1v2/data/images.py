"""Images into tiles, as InternVL cuts them: the grid nearest in aspect ratio, and a thumbnail of the whole."""

from __future__ import annotations

import functools
import io
import struct
import zlib

import numpy
import torch
from PIL import Image

from megatron_r1v2.data.samples import SampleError

# What Pillow raises for broken files of the formats that we store; anything else is a bug of ours and must surface.
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
    """Decode an image completely, so that a truncated file is found now.

    Args:
        data: The encoded file.
        name: What to call it in an error.

    Returns:
        An RGB image. Transparency is dropped and no EXIF rotation is applied, as InternVL does.

    Raises:
        SampleError: If the file cannot be decoded to its end.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except _DECODE_ERRORS as error:
        raise SampleError(f"image {name}: cannot be decoded ({len(data)} bytes): {error}") from error


def tile_limit(max_tiles: int, num_images: int) -> int:
    """Return how many tiles each image of a prompt may have.

    Args:
        max_tiles: The limit of the whole prompt, thumbnails not counted.
        num_images: Images in the prompt, at least one.

    Returns:
        max(1, max_tiles // num_images), InternVL's rule.
    """
    return max(1, max_tiles // num_images)


@functools.lru_cache(maxsize=16)
def _grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """List all (columns, rows) of at most `max_tiles` tiles by number of tiles."""
    sides = range(1, max_tiles + 1)
    return tuple(
        sorted(((c, r) for c in sides for r in sides if c * r <= max_tiles), key=lambda grid: grid[0] * grid[1])
    )


def choose_grid(width: int, height: int, *, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """Choose how many tiles an image is cut into.

    The grid nearest to the image's aspect ratio wins; where two are equally near (2x1 and 4x2 are), the larger one is
    taken only if the image has more than half of its pixels.

    Args:
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        tile_size: Pixels on each side of a tile.
        max_tiles: The most tiles, thumbnail not counted.

    Returns:
        (columns, rows).

    Raises:
        ValueError: If a size is below one.
    """
    if min(width, height, tile_size, max_tiles) < 1:
        raise ValueError(
            "image tiling needs sizes of at least 1, got "
            f"width {width}, height {height}, tile_size {tile_size}, max_tiles {max_tiles}"
        )
    aspect_ratio = width / height
    best, best_difference = (1, 1), float("inf")
    for columns, rows in _grids(max_tiles):
        difference = abs(aspect_ratio - columns / rows)
        enough_pixels = width * height > 0.5 * tile_size * tile_size * columns * rows
        if difference < best_difference or (difference == best_difference and enough_pixels):
            best, best_difference = (columns, rows), difference
    return best


def tile_image(image: Image.Image, *, tile_size: int, max_tiles: int) -> torch.Tensor:
    """Cut an image into tiles.

    Args:
        image: Any size; converted to RGB.
        tile_size: Pixels on each side of a tile: the model's image size.
        max_tiles: The most tiles, thumbnail not counted.

    Returns:
        uint8 [T, 3, tile_size, tile_size]: the tiles row by row, then a thumbnail iff there is more than one tile.

    Raises:
        ValueError: If a size is below one.
    """
    image = image.convert("RGB")
    columns, rows = choose_grid(image.width, image.height, tile_size=tile_size, max_tiles=max_tiles)
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
