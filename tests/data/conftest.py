"""A folder of images of several formats, one of them broken."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.tiny import tiny_png


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "images")


def write_pictures(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.png").write_bytes(tiny_png(1))
    Image.new("RGB", (20, 10), (9, 8, 7)).save(folder / "b.jpg")
    Image.new("P", (20, 10)).save(folder / "c.gif")
    (folder / "broken.png").write_bytes(tiny_png(1)[:-300])
    return folder
