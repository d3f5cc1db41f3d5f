"""Templates that escape, pages that are written whole, and pictures of which only pixels get through."""

import base64
import io

import pytest
from PIL import Image

from megatron_r1v2.report.html import MAX_SIDE, data_uri, template, write_page


def base64_of(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def picture_of(uri):
    kind, _, content = uri.partition(";base64,")
    return kind, Image.open(io.BytesIO(base64.b64decode(content)))


def test_a_template_escapes_what_it_is_given():
    page = template("report.html").render(
        name="<script>", folder="&", groups=[], changes={}, notes=["<b>"], cards=[], settings=""
    )
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert "&lt;b&gt;" in page


def test_half_a_surrogate_pair_is_written_as_a_question_mark(tmp_path):
    path = write_page(tmp_path / "new" / "page.html", "caf\u00e9 \ud800")
    assert path.read_bytes() == b"caf\xc3\xa9 ?"
    assert [each.name for each in path.parent.iterdir()] == ["page.html"]


def test_a_small_picture_keeps_its_pixels_and_is_shown_enlarged():
    image = Image.effect_noise((8, 4), 90).convert("RGB")
    picture = data_uri(base64_of(image, format="PNG"))
    kind, shown = picture_of(picture.uri)
    assert kind == "data:image/png"
    assert list(shown.getdata()) == list(image.getdata())
    assert (picture.width, picture.height, picture.pixelated) == (256, 128, True)


def test_a_photograph_is_made_small_and_loses_what_it_carried():
    comment = b"<script>alert(1)</script>"
    image = Image.effect_noise((1000, 500), 90).convert("RGB")
    picture = data_uri(base64_of(image, format="JPEG", comment=comment))
    kind, shown = picture_of(picture.uri)
    assert kind == "data:image/jpeg"
    assert shown.size == (MAX_SIDE, MAX_SIDE // 2)
    assert comment not in base64.b64decode(picture.uri.partition(",")[2])
    assert not picture.pixelated


@pytest.mark.parametrize("png", [None, 7, "", "!", "AAAA", base64.b64encode(b"GIF89a").decode(), ["a"]])
def test_what_is_no_image_gives_no_picture(png):
    assert data_uri(png) is None
