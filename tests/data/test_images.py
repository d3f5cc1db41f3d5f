from __future__ import annotations

import io
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import GotOcr2ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from megatron_r1v2.data.images import (
    choose_grid,
    decode_image,
    image_size,
    name_images,
    storable_image,
    tile_image,
    tile_limit,
)
from megatron_r1v2.data.samples import SampleError
from tests.tiny import tiny_png

SIZES = st.integers(1, 3000)


def random_image(width: int, height: int) -> Image.Image:
    return Image.open(io.BytesIO(tiny_png(width * 7 + height, width=width, height=height)))


@pytest.mark.parametrize(("width", "height"), [(64, 32), (32, 32), (100, 37), (37, 100), (500, 300), (31, 400)])
@pytest.mark.parametrize(("tile_size", "max_tiles"), [(32, 12), (48, 6), (32, 1)])
def test_tiles_are_those_of_transformers(width: int, height: int, tile_size: int, max_tiles: int) -> None:
    image = random_image(width, height)
    processor = GotOcr2ImageProcessorPil(
        size={"height": tile_size, "width": tile_size},
        crop_to_patches=True,
        max_patches=max_tiles,
        do_rescale=False,
        do_normalize=False,
    )
    theirs = torch.as_tensor(numpy.array(processor(image, return_tensors="pt")["pixel_values"]))
    ours = tile_image(image, tile_size=tile_size, max_tiles=max_tiles)
    assert ours.dtype == torch.uint8
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=0)


@settings(max_examples=300, deadline=None)
@given(width=SIZES, height=SIZES, tile_size=st.sampled_from([32, 448]), max_tiles=st.integers(1, 12))
def test_grid_is_that_of_transformers(width: int, height: int, tile_size: int, max_tiles: int) -> None:
    theirs = get_optimal_tiled_canvas((height, width), (tile_size, tile_size), 1, max_tiles)
    assert choose_grid(width, height, tile_size=tile_size, max_tiles=max_tiles) == theirs


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 200), height=st.integers(1, 200), max_tiles=st.integers(1, 12))
def test_tile_count_and_thumbnail(width: int, height: int, max_tiles: int) -> None:
    tiles = tile_image(Image.new("RGB", (width, height)), tile_size=8, max_tiles=max_tiles)
    columns, rows = choose_grid(width, height, tile_size=8, max_tiles=max_tiles)
    assert columns * rows <= max_tiles
    assert tiles.shape == (columns * rows + (columns * rows > 1), 3, 8, 8)


def test_equally_near_grids_take_the_larger_only_with_enough_pixels() -> None:
    # Aspect ratio 2: 2x1 and 4x2 are both exact. 4x2 tiles of 448 have 1,605,632 pixels; half of it is 802,816.
    assert choose_grid(1264, 632, tile_size=448, max_tiles=12) == (2, 1)  # 798,848 pixels
    assert choose_grid(1268, 634, tile_size=448, max_tiles=12) == (4, 2)  # 803,912 pixels
    # Without a tie the number of pixels does not matter.
    assert choose_grid(128, 32, tile_size=32, max_tiles=8) == (4, 1)


def test_tiles_go_row_by_row_and_the_thumbnail_is_last() -> None:
    image = Image.new("RGB", (16, 16))
    for number, corner in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
        image.paste((50 * number + 10, 0, 200), (*corner, corner[0] + 8, corner[1] + 8))
    tiles = tile_image(image, tile_size=8, max_tiles=4)
    assert [int(tile[0].float().median()) for tile in tiles[:4]] == [10, 60, 110, 160]
    assert tiles.shape[0] == 5
    assert int(tiles[:4, 1].max()) == 0
    assert int(tiles[:4, 2].min()) == 200
    thumbnail = numpy.array(image.resize((8, 8), Image.Resampling.BICUBIC))
    assert torch.equal(tiles[4].permute(1, 2, 0), torch.from_numpy(thumbnail))


def test_several_images_share_the_limit() -> None:
    assert [tile_limit(12, images) for images in (1, 2, 5, 12, 13, 40)] == [12, 6, 2, 1, 1, 1]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert tile_image(Image.new(mode, (10, 10)), tile_size=8, max_tiles=1).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", tiny_png(1)[:-40], tiny_png(1)[:60], tiny_png(1)[:100] + b"\x00" * 50 + tiny_png(1)[150:]],
)
def test_broken_files_are_sample_errors(data: bytes) -> None:
    with pytest.raises(SampleError, match=r"k\.0\.png"):
        decode_image(data, "k.0.png")


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="max_tiles 0"):
        choose_grid(10, 10, tile_size=8, max_tiles=0)


def test_only_the_formats_of_shards_are_stored_as_they_are(images: Path) -> None:
    for name, extension in {"a.png": "png", "b.jpg": "jpg"}.items():
        data = (images / name).read_bytes()
        assert storable_image(data, name) == (extension, data)
    extension, data = storable_image((images / "c.gif").read_bytes(), "c.gif")
    assert extension == "png"
    assert decode_image(data, "c.gif").size == (20, 10)
    with pytest.raises(SampleError, match=r"image broken.png: cannot be decoded"):
        storable_image((images / "broken.png").read_bytes(), "broken.png")


def test_images_are_numbered_in_order_of_appearance() -> None:
    assert name_images([("png", b"one"), ("jpg", b"two")]) == {"0.png": b"one", "1.jpg": b"two"}


def test_the_size_of_an_upright_image_is_that_of_its_pixels(images: Path) -> None:
    for name in ("a.png", "b.jpg", "c.gif"):
        data = (images / name).read_bytes()
        assert image_size(io.BytesIO(data), name) == decode_image(data, name).size
    exif = Image.Exif()
    exif[0x0112] = 6
    for form in ("JPEG", "WEBP", "PNG"):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 20)).save(buffer, form, exif=exif)
        assert image_size(io.BytesIO(buffer.getvalue()), form) == (20, 40), form
    with pytest.raises(SampleError, match=r"image k\.0\.png: cannot be decoded"):
        image_size(io.BytesIO(b"nothing"), "k.0.png")
