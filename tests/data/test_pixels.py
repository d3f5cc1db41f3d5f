"""Images of every depth and format as 8-bit RGB: the same picture, whatever the file is."""

from __future__ import annotations

import io
import struct
import zlib

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from megatron_r1v2.data.images import decode_image, storable_image
from megatron_r1v2.data.pixels import describe_other_content
from megatron_r1v2.data.samples import SampleError

RAMP = numpy.linspace(0, 1, 256)[None].repeat(64, 0)
WIDE = {
    "16 bits": (RAMP * 65535).astype(numpy.uint16),
    "14 bits in 16": (RAMP * 16383).astype(numpy.uint16),
    "12 bits in 16": (RAMP * 4095).astype(numpy.uint16),
    "8 bits in 16": (RAMP * 255).astype(numpy.uint16),
    "a mask of 0 and 1": (RAMP > 0.5).astype(numpy.uint16),
    "32 bits": (RAMP * (2**31 - 1)).astype(numpy.int32),
    "negative numbers": ((RAMP - 0.5) * 2000).astype(numpy.int32),
    "floats from 0 to 1": RAMP.astype(numpy.float32),
    "floats from 0 to 255": (RAMP * 255).astype(numpy.float32),
    "floats around 0": (RAMP * 6 - 3).astype(numpy.float32),
}


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> numpy.ndarray:
    return numpy.asarray(decode_image(data, "k.0.png"))


@pytest.mark.parametrize(
    ("values", "form"),
    [(values, form) for values in WIDE.values() for form in ("TIFF", "PNG") if form == "TIFF" or values.dtype == "u2"],
)
def test_the_whole_range_is_kept(values: numpy.ndarray, form: str) -> None:
    found = pixels(encode(Image.fromarray(values), form))
    expected = (RAMP > 0.5) * 255.0 if len(numpy.unique(values)) == 2 else RAMP * 255
    assert numpy.abs(found - expected[..., None]).max() <= 1
    stored = storable_image(encode(Image.fromarray(values), form), "a")
    assert stored[0] == "png"
    with Image.open(io.BytesIO(stored[1])) as image:  # as any other reader sees it
        assert image.mode == "RGB"
        assert numpy.array_equal(numpy.asarray(image), found)


@settings(max_examples=200, deadline=None)
@given(
    arrays(numpy.float32, (2, 3), elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False))
    | arrays(numpy.float32, (2, 3), elements=st.floats(0, 1, width=32, allow_subnormal=False))
    | arrays(numpy.uint16, (2, 3), elements=st.integers(0, 65535))
    | arrays(numpy.int32, (2, 3), elements=st.integers(-(2**31), 2**31 - 1))
)
def test_an_image_is_one_colour_only_if_its_file_is_and_order_is_kept(values: numpy.ndarray) -> None:
    found = pixels(encode(Image.fromarray(values), "TIFF"))[..., 0].astype(int).ravel()
    # float32 holds 24 bits: closer numbers than that are one.
    distinct = numpy.unique(values.astype(numpy.float32))
    assert (len(set(found)) == 1) == (len(distinct) == 1)
    order = numpy.argsort(values.ravel(), kind="stable")
    assert (numpy.diff(found[order]) >= 0).all()


def test_numbers_that_are_none_are_refused() -> None:
    for bad in (numpy.nan, numpy.inf):
        data = encode(Image.fromarray(numpy.array([[0.5, bad]], numpy.float32)), "TIFF")
        with pytest.raises(SampleError, match=r"k\.0\.png.*NaN or infinite"):
            pixels(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_format_is_turned_upright(form: str, orientation: int) -> None:
    upright = Image.new("RGB", (40, 80), (250, 10, 10))
    upright.paste((10, 250, 10), (0, 0, 40, 20))
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    lying = upright.transpose(back[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"tiffinfo": exif} if form == "TIFF" else {"exif": exif}
    data = encode(lying, form, **options)
    assert pixels(data).shape == (80, 40, 3)
    assert numpy.abs(pixels(data).astype(int) - numpy.asarray(upright).astype(int)).mean() < 8
    extension, stored = storable_image(data, "a")
    if orientation == 1 and form != "TIFF":
        assert stored == data
    else:
        assert extension == "png"
        assert numpy.array_equal(pixels(stored), pixels(data))


def transparent(mode: str) -> Image.Image:
    """Return a black square on nothing, in a mode with transparency."""
    ink = numpy.zeros((10, 20), numpy.uint8)
    ink[2:8, 5:15] = 255
    image = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    image.putalpha(Image.fromarray(ink))
    if mode == "P":
        palette = Image.fromarray((ink == 0).astype(numpy.uint8), "L").convert("P")
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.info["transparency"] = 1
        return palette
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "form"), [("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("P", "GIF"), ("RGBA", "WEBP")]
)
def test_transparency_is_laid_on_white(mode: str, form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    data = encode(transparent(mode), form, **options)
    found = pixels(data)
    assert tuple(found[0, 0]) == (255, 255, 255)
    assert tuple(found[5, 10]) == (0, 0, 0)
    extension, stored = storable_image(data, "a")
    assert extension == "png"
    with Image.open(io.BytesIO(stored)) as image:
        assert image.mode == "RGB"


def test_an_opaque_alpha_channel_changes_nothing() -> None:
    picture = Image.effect_noise((20, 10), 80).convert("RGB")
    data = encode(picture.convert("RGBA"), "PNG")
    assert numpy.array_equal(pixels(data), numpy.asarray(picture))
    assert storable_image(data, "a") == ("png", data)


def test_white_on_nothing_is_refused_and_one_colour_is_not() -> None:
    white = transparent("RGBA")
    white.paste((255, 255, 255), (0, 0, 20, 10), white.getchannel("A"))
    with pytest.raises(SampleError, match=r"k\.0\.png.*all white once its transparency is laid on white"):
        pixels(encode(white, "PNG"))
    assert set(pixels(encode(Image.new("RGBA", (4, 4), (255, 255, 255, 0)), "PNG")).ravel()) == {255}
    assert set(pixels(encode(Image.new("RGB", (4, 4), "red"), "PNG"))[..., 0].ravel()) == {255}
    assert set(pixels(encode(Image.new("I;16", (4, 4), 300), "PNG")).ravel()) == {75}  # 300 of 1023


def wide_png(values_HWC: numpy.ndarray) -> bytes:
    """Encode 16 bits a channel as PNG, which Pillow only reads."""
    height, width, channels = values_HWC.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values_HWC)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_16_bits_are_scaled_or_refused(channels: int) -> None:
    ramp = (RAMP * 65535)[..., None].repeat(channels, 2)
    ramp[..., 3:] = 65535
    if channels == 2:
        ramp[..., 1] = 65535
    assert numpy.abs(pixels(wide_png(ramp)) - RAMP[..., None] * 255).max() <= 1
    with pytest.raises(SampleError, match="16 bits, of which at most the lower 12 are used"):
        pixels(
            wide_png(
                ramp * numpy.array([1 / 16] * (channels if channels == 3 else channels - 1) + [1] * (channels != 3))
            )
        )


OTHER = {
    b"": "is empty",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n": "Git LFS pointer.*git lfs pull",
    b"../.git/annex/objects/zX/1k/SHA256E-s31390--0f/SHA256E-s31390--0f.png\n": "git-annex pointer",
    b"<!DOCTYPE html><html>404</html>": "HTML page",
    b"\xef\xbb\xbf\n <HTML><body>Sign in": "HTML page",
    b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>": "XML",
    b'<svg xmlns="http://www.w3.org/2000/svg"/>': "XML",
    b'{"error": "rate limit"}': "JSON",
    b"%PDF-1.7\n": "PDF",
    b"anything": "cannot be decoded",
}


@pytest.mark.parametrize(("data", "message"), OTHER.items(), ids=OTHER.values())
def test_what_is_no_image_is_refused_by_its_name(data: bytes, message: str) -> None:
    for read in (decode_image, storable_image):
        with pytest.raises(SampleError, match=rf"image a\.png.*{message}.*"):
            read(data, "a.png")


def test_images_are_not_taken_for_something_else() -> None:
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        assert describe_other_content(encode(Image.new("RGB", (8, 8)), form)) is None
