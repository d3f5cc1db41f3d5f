"""Chat messages with images in their places."""

import base64

import pytest

from megatron_r1v2.data.messages import data_url, image_format, openai_messages
from tests.tiny import tiny_png


def test_images_go_where_the_text_has_them():
    first, second = tiny_png(1), tiny_png(2)
    results = openai_messages(
        [{"role": "user", "content": "a <image> b <image>"}, {"role": "assistant", "content": "c"}], [first, second]
    )
    assert [part["type"] for part in results[0]["content"]] == ["text", "image_url", "text", "image_url"]
    assert [part["text"] for part in results[0]["content"] if part["type"] == "text"] == ["a ", " b "]
    urls = [part["image_url"]["url"] for part in results[0]["content"] if part["type"] == "image_url"]
    assert [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls] == [first, second]
    assert results[1] == {"role": "assistant", "content": "c"}


def test_missing_images_and_unknown_formats_are_refused():
    with pytest.raises(ValueError, match=r"1 <image> and there are 0 encoded images"):
        openai_messages([{"role": "user", "content": "<image>"}], [])
    assert [image_format(data) for data in (tiny_png(1), b"\xff\xd8\xff\xe0", b"RIFF0000WEBP")] == [
        "png",
        "jpeg",
        "webp",
    ]
    with pytest.raises(ValueError, match="neither PNG, JPEG nor WebP"):
        data_url(b"GIF89a")
