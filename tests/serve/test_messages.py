"""Chat messages: their shapes, their images within limits, and what is told of those that are refused."""

from __future__ import annotations

import base64
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_r1v2.serve.messages import MAX_IMAGES, MAX_MESSAGES, Turn, read_messages
from megatron_r1v2.serve.web import RequestError
from tests.tiny import tiny_png

PNG = "data:image/png;base64,"


def picture(data: bytes = b"", head: str = PNG) -> dict:
    return {"type": "image_url", "image_url": {"url": head + base64.b64encode(data or tiny_png(1)).decode()}}


def encoded(width: int, height: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (250, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def user(content) -> list:
    return [{"role": "user", "content": content}]


def test_text_and_images_stay_in_their_order():
    (turn,) = read_messages(
        user([{"type": "text", "text": "a"}, picture(encoded(5, 4)), {"type": "text", "text": "b"}])
    )
    assert (turn.role, turn.parts[0], turn.parts[2]) == ("user", "a", "b")
    assert (turn.parts[1].size, turn.parts[1].mode, turn.parts[1].getpixel((0, 0))) == ((5, 4), "RGB", (250, 0, 0))
    assert read_messages(user("a")) == [Turn("user", ("a",))]
    assert read_messages(user([])) == [Turn("user", ())]


def test_roles_and_contents_as_clients_send_them():
    messages = [
        {"role": "developer", "content": "Think.", "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": None, "refusal": None},
        {"role": "assistant", "content": ""},
        *user("a"),
    ]
    assert [(turn.role, turn.parts) for turn in read_messages(messages)] == [
        ("system", ("Think.",)), ("assistant", ("",)), ("assistant", ("",)), ("user", ("a",)),
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [("PNG", "png"), ("JPEG", "jpeg"), ("JPEG", "JPG"), ("WEBP", "webp")])
def test_images_of_three_formats_and_both_shapes_of_their_address(kind, name):
    part = picture(encoded(5, 4, kind), f"data:image/{name};base64,")
    for content in ([part], [{**part, "image_url": part["image_url"]["url"]}]):
        assert read_messages(user(content))[0].parts[0].size == (5, 4)


@pytest.mark.parametrize(
    "head",
    [
        "data:application/octet-stream;base64,",
        "data:image/png;charset=utf-8;base64,",
        "data:;base64,",
        "Data:image/*;base64,",
    ],
)
def test_images_of_clients_that_know_no_type_or_say_more(head):
    assert read_messages(user([picture(encoded(5, 4), head)]))[0].parts[0].size == (5, 4)
    lines = base64.encodebytes(encoded(5, 4)).decode()
    for content in (lines, lines.rstrip("=\n"), lines.translate(str.maketrans("+/", "-_"))):
        part = {"type": "image_url", "image_url": {"url": head + content}}
        assert read_messages(user([part]))[0].parts[0].size == (5, 4)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"<!DOCTYPE html><html>404</html>", "it is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "it is a Git LFS pointer"),
        (b"%PDF-1.7", "it is a PDF"),
        (b"", "it is empty"),
        (b"GIF89a", "it begins with b'GIF89a'"),
    ],
)
@pytest.mark.parametrize("head", [PNG, "data:application/octet-stream;base64,"])
def test_what_is_no_image_is_refused_by_what_it_is(data, told, head):
    part = {"type": "image_url", "image_url": {"url": head + base64.b64encode(data).decode()}}
    with pytest.raises(RequestError, match=rf"no PNG, JPEG or WebP image \({len(data)} bytes\): {told}"):
        read_messages(user([part]))


@pytest.mark.parametrize(
    ("messages", "status", "told"),
    [
        (None, 400, "messages must be a list with at least one message"),
        ([], 400, "messages must be a list"),
        ({"role": "user"}, 400, "messages must be a list"),
        (["a"], 400, r"messages\[0\]: a message is an object with role and content, got str"),
        ([*user("a"), 1], 400, r"messages\[1\]: a message is an object"),
        (user("a") * (MAX_MESSAGES + 1), 413, "257 messages; accepted: at most 256"),
        ([{"role": "robot", "content": "a"}], 400, r"messages\[0\].role='robot'; accepted: system, user, assistant"),
        ([{"content": "a"}], 400, r"messages\[0\].role='None'; accepted"),
        ([{"role": "user"}], 400, r"messages\[0\].content must be text or a list of parts, got NoneType"),
        (user(5), 400, "content must be text or a list of parts, got int"),
        ([{"role": "assistant", "content": None, "tool_calls": [1]}], 400, r"\[0\].tool_calls is not supported"),
        ([{"role": "assistant", "content": "a", "audio": {"id": 1}}], 400, r"messages\[0\].audio is not supported"),
        (user(["a"]), 400, r'messages\[0\].content\[0\]: accepted are {"type": "text", "text": ...} and'),
        (user([{"type": "text"}]), 400, r"content\[0\]: accepted are"),
        (user([{"type": "text", "text": "a"}, {"type": "audio"}]), 400, r"content\[1\]: accepted are"),
        (user([{"type": "image_url", "image_url": {"url": 5}}]), 400, r"content\[0\]: accepted are"),
        (user("\ud800"), 400, r"messages\[0\].content has half of a surrogate pair"),
        (user([{"type": "text", "text": "\udc00"}]), 400, r"messages\[0\].content has half of a surrogate pair"),
        (
            user([{"type": "image_url", "image_url": "http://example.com/b.png"}]),
            400,
            r"content\[0\]: got 'http://example.com/b.png'; acc",
        ),
        (user([picture(head="data:image/gif;base64,")]), 400, "This server fetches nothing"),
        (user([{"type": "image_url", "image_url": PNG + "!!!"}]), 400, r"content\[0\]: not base64"),
        (user([picture(b"GIF89a")]), 400, r"content\[0\]: no PNG, JPEG or WebP image \(6 bytes\)"),
        (user([picture(encoded(3, 3, "BMP"))]), 400, "no PNG, JPEG or WebP"),
        (user([picture(tiny_png(1)[:-40])]), 400, r"messages\[0\].content\[0\]: cannot be decoded"),
        (user([picture()] * (MAX_IMAGES + 1)), 413, "more than 16 images"),
        ([*user([picture()]), *user([picture()] * MAX_IMAGES)], 413, "more than 16 images"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_message_and_what_is_accepted(messages, status, told):
    with pytest.raises(RequestError, match=told) as caught:
        read_messages(messages)
    assert caught.value.status == status
    assert caught.value.param == ("messages" if "surrogate" in told else None)


def test_images_are_counted_and_measured_before_one_is_decoded(monkeypatch):
    decoded = []
    monkeypatch.setattr("megatron_r1v2.serve.messages.decode_image", lambda *_: decoded.append(1))
    with pytest.raises(RequestError, match="more than 16"):
        read_messages(user([picture()] * 17))
    large = io.BytesIO()
    Image.new("1", (7000, 7000)).save(large, "PNG")
    with pytest.raises(RequestError, match="49000000 pixels; accepted: at most 40000000") as caught:
        read_messages(user([picture(large.getvalue())]))
    assert (caught.value.status, decoded) == (413, [])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(PNG),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "image_url", "url", "x"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(messages=JSON | st.lists(JSON, max_size=3))
def test_whatever_is_sent_is_read_or_refused(messages):
    refused = None
    try:
        assert all(turn.role in ("system", "user", "assistant") for turn in read_messages(messages))
    except RequestError as error:
        refused = error
    assert refused is None or 400 <= refused.status < 500
