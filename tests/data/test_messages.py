"""Chat messages with images in their places."""

import base64
from urllib.parse import quote, quote_from_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1v2.data.messages import data_url, data_url_type, decode_data_url, image_format, openai_messages
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


def in_lines(text: str) -> str:
    return "\r\n".join(text[start : start + 76] for start in range(0, len(text), 76)) + "\n"


WRITTEN = {
    "as it is": lambda data: data_url_of(base64.b64encode(data).decode()),
    "in lines": lambda data: data_url_of(in_lines(base64.b64encode(data).decode())),
    "without padding": lambda data: data_url_of(base64.b64encode(data).decode().rstrip("=")),
    "url-safe": lambda data: data_url_of(base64.urlsafe_b64encode(data).decode()),
    "percent-encoded": lambda data: data_url_of(quote(base64.b64encode(data).decode(), safe="")),
    "with a parameter": lambda data: data_url_of(base64.b64encode(data).decode(), "IMAGE/PNG;charset=utf-8;BASE64"),
    "with a name": lambda data: data_url_of(base64.b64encode(data).decode(), 'image/png;name="a b.png";base64'),
    "without a type": lambda data: data_url_of(base64.b64encode(data).decode(), ";base64"),
    "not base64": lambda data: data_url_of(quote_from_bytes(data), "image/png"),
}


def data_url_of(content: str, head: str = "image/png;base64") -> str:
    return f"data:{head},{content}"


@pytest.mark.parametrize("way", WRITTEN)
@given(data=st.binary(max_size=200))
def test_a_data_url_is_decoded_however_it_is_written(way: str, data: bytes) -> None:
    url = WRITTEN[way](data)
    assert decode_data_url(url) == data
    assert data_url_type(url) == ("" if way == "without a type" else "image/png")


def test_what_is_no_data_url_or_no_base64_is_refused() -> None:
    assert data_url_type("http://example.com/a.png") is None
    with pytest.raises(ValueError, match="'http://example.com/a.png' is no data URL"):
        decode_data_url("http://example.com/a.png")
    for content in ("!!!!", "A", "AAAA=AAA", "\u20ac"):
        with pytest.raises(ValueError, match=r"base64|padding|Only|data"):
            decode_data_url(data_url_of(content))
