"""Images as rows give them, and columns that hold one under another name."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from megatron_r1v2.data.row_images import as_list, is_media, load_image
from megatron_r1v2.data.samples import SampleError
from tests.tiny import tiny_png

PNG = tiny_png(1)
TEXT = base64.b64encode(PNG).decode()
FORMS = {
    "a path": "a.png",
    "a file URL": "file://a.png",
    "bytes": PNG,
    "a struct of bytes": {"bytes": PNG, "path": None},
    "a struct of a path": {"bytes": None, "path": "a.png"},
    "an object of ms-swift": {"image": "a.png"},
    "an object of OpenAI": {"url": f"data:image/png;base64,{TEXT}"},
    "a nested object": {"image_url": {"url": f"data:image/png;base64,{TEXT}"}},
    "a data URL": f"data:image/png;base64,{TEXT}",
    "a data URL with line breaks": f"data:image/png;base64,{TEXT[:40]}\n{TEXT[40:]}\n",
    "a data URL without padding": f"data:image/png;base64,{TEXT.rstrip('=')}",
    "a data URL with a parameter": f"data:image/png;charset=utf-8;base64,{TEXT}",
    "a data URL of no type": f"data:application/octet-stream;base64,{TEXT}",
    "the other alphabet": "data:image/png;base64," + base64.urlsafe_b64encode(PNG).decode(),
    "base64": TEXT,
}


@pytest.mark.parametrize("value", FORMS.values(), ids=FORMS.keys())
def test_an_image_in_each_of_its_forms(images: Path, value: object) -> None:
    assert load_image(value, images) == ("png", PNG)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere.png", r"nowhere\.png does not exist"),
        ("a" * 5000, "does not exist"),
        ("a\0.png", "does not exist"),
        ("https://example.com/a.png", "on the network, and nothing is downloaded"),
        ({"bytes": "iVBOR"}, "an image must be a path"),
        ({"path": None}, "an image must be a path"),
        (8, "an image must be a path"),
        ("data:image/png;base64,not%base64", "not base64"),
        (f"data:image/png;base64,{TEXT[:100]}", "cannot be decoded"),
        ({"bytes": PNG[:200], "path": "x.png"}, r"image x\.png: cannot be decoded"),
        (b"<html>", "HTML page"),
    ],
)
def test_what_is_no_image(images: Path, value: object, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        load_image(value, images)


def test_lists_of_images() -> None:
    assert [as_list(value) for value in (None, "", [], "a.png", ["a", "b"], {"path": "a"})] == [
        [], [], [], ["a.png"], ["a", "b"], [{"path": "a"}],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"x", True), ("dir/a b.JPG", True), (f"data:image/png;base64,{TEXT}", True), (["a.png"], True),
        ({"bytes": b"x"}, True), ({"more": {"path": "clip.mp4"}}, True), ("geometry", False), (3, False),
        ("Look at the picture.", False), ("3.5", False), (["a", "b"], False), (None, False), ("text\na.png", False),
    ],
)  # fmt: skip
def test_columns_that_hold_or_name_an_image(value: object, expected: bool) -> None:
    assert is_media(value) is expected
