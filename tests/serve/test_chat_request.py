"""Accepted requests, and the messages for refused ones."""

from __future__ import annotations

import base64
import io
import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_r1v2.config.schema import GenerationConfig
from megatron_r1v2.data.messages import openai_messages
from megatron_r1v2.serve.chat_request import read_chat_request, served_request
from megatron_r1v2.serve.web import RequestError, error_body
from tests.tiny import tiny_png

SETTINGS = GenerationConfig(max_response_tokens=65536, temperature=0.6)
SERVED = served_request("tiny", SETTINGS, max_choices=8)
MESSAGES = [{"role": "user", "content": "hello"}]


def read(**fields):
    return read_chat_request({"messages": MESSAGES, **fields}, SERVED)


def image_part(data: bytes = b"", kind: str = "png") -> dict:
    url = f"data:image/{kind};base64," + base64.b64encode(data or tiny_png(1)).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def test_what_is_not_said_is_the_servers_default():
    asked = read()
    assert (asked.response_tokens, asked.temperature, asked.top_p, asked.n) == (65536, 0.6, 1.0, 1)
    assert (asked.stop, asked.stream, asked.stream_options.include_usage, asked.seed, asked.logprobs) == (
        (),
        False,
        False,
        None,
        False,
    )
    assert read(temperature=None, stop=None, seed=None, max_tokens=None) == asked
    assert read(user="me", store=False, presence_penalty=0, frequency_penalty=0.0, tools=[], top_k=-1) == asked


def test_the_picture_of_the_documentation(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    command = page.partition("With a picture:\n\n")[2].partition("\n\n")[0]
    request, pipe, curl = command.rpartition("|\n")
    assert pipe
    assert "curl " in curl
    (tmp_path / "picture.png").write_bytes(tiny_png(1))
    printed = subprocess.run(["bash", "-c", request], cwd=tmp_path, capture_output=True, check=True).stdout
    asked = read_chat_request(json.loads(printed), SERVED)
    assert [turn.role for turn in asked.turns] == ["user"]
    assert [image.size for image in asked.images] == [Image.open(io.BytesIO(tiny_png(1))).size]


def test_what_is_said_is_taken():
    asked = read(
        model="tiny",
        max_completion_tokens=65536,
        temperature=0,
        top_p=1,
        n=8,
        stop="END",
        stream=True,
        stream_options={"include_usage": True},
        seed=-3,
        logprobs=True,
        top_logprobs=20,
    )
    assert (asked.temperature, asked.top_p, asked.n, asked.stop, asked.seed) == (0.0, 1.0, 8, ("END",), -3)
    assert asked.stream
    assert asked.stream_options.include_usage
    assert (asked.logprobs, asked.top_logprobs) == (True, 20)
    assert read(max_tokens=5, max_completion_tokens=5).response_tokens == 5
    assert (read(logprobs=True).logprobs, read(logprobs=True).top_logprobs) == (True, 0)


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"temperature": 2.5}, "temperature", "temperature=2.5 is out of range; accepted: 0 to 2"),
        ({"temperature": 0.001}, "temperature", "temperature=0.001; accepted: 0 .* or 0.01 to 2"),
        ({"temperature": True}, "temperature", "temperature=True; accepted: a number"),
        ({"temperature": float("nan")}, "temperature", "temperature=nan is out of range"),
        ({"temperature": 10**400}, "temperature", "is out of range; accepted: 0 to 2"),
        ({"top_p": 0}, "top_p", "top_p=0 leaves no token"),
        ({"top_p": "1"}, "top_p", "top_p='1'; accepted: a number from 0 to 1"),
        ({"n": 0}, "n", "n=0 is out of range; accepted: 1 to 8"),
        ({"n": 1.0}, "n", "n=1.0; accepted: a whole number"),
        ({"max_tokens": 65537}, "max_tokens", "max_tokens=65537 is out of range; accepted: 1 to 65536"),
        (
            {"max_completion_tokens": 0},
            "max_completion_tokens",
            "accepted: 1 to 65536, the server's generation.max_response_tokens",
        ),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "name one limit"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": ""}, "stop", "stop=''; accepted"),
        ({"stop": [1]}, "stop", r"stop=\[1\]; accepted"),
        ({"stream": "yes"}, "stream", "stream='yes'; accepted: true or false"),
        ({"stream_options": 1}, "stream_options", "stream_options=1; accepted: an object"),
        ({"seed": 2**63}, "seed", "seed=9223372036854775808 is out of range"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs=21 is out of range; accepted: 0 to 20"),
        ({"logprobs": 5}, "logprobs", "logprobs=5; accepted: true or false"),
        ({"temprature": 1}, "temprature", "unknown field 'temprature'; did you mean 'temperature'"),
        ({"\ud800": 1}, "\ud800", "unknown field"),
        ({"tools": [{}]}, "tools", r"tools=\[{}\] is not supported; accepted: \[\]"),
        ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty=0.5 is not supported; accepted: 0"),
        (
            {"reasoning_effort": "high"},
            "reasoning_effort",
            "reasoning_effort='high' is not supported; accepted: 'medium'",
        ),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs", "is not supported"),
        ({"min_tokens": 5}, "min_tokens", "min_tokens=5 is not supported; accepted: 0"),
        ({"messages": [{"role": "tool", "content": "4", "tool_call_id": "a"}]}, None, "role='tool'.* calls no tools"),
        ({"messages": [{"role": {}, "content": "x"}]}, None, r"role='{}'; accepted: system, user, assistant"),
        ({"messages": [{"role": "user", "content": None}]}, None, "must be text or a list of parts, got NoneType"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}, *MESSAGES]},
            None,
            r"messages\[0\].tool_calls is not supported",
        ),
        ({"messages": []}, None, "messages must be a list"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "the last message must be the user's"),
        ({"messages": [{"role": "user", "content": "an <image>"}]}, "messages", r"messages\[0\].content has '<image>'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", r"messages\[0\].content has half"),
        (
            {"messages": [{"role": "user", "content": [image_part(b"no image")]}]},
            None,
            r"messages\[0\].content\[0\]: no",
        ),
    ],
)
def test_a_refusal_names_the_field_the_value_and_what_is_accepted(fields, param, told):
    with pytest.raises(RequestError, match=told) as caught:
        read(**fields)
    assert caught.value.status == 400
    assert caught.value.param == param
    body = json.loads(json.dumps(error_body(400, str(caught.value), param=param), ensure_ascii=False).encode())
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"] == (param and param.replace("\ud800", "\\ud800"))


@pytest.mark.parametrize(("kind", "format_"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_images_of_three_formats_are_decoded(kind, format_, tmp_path):
    path = tmp_path / "image"
    Image.new("RGB", (5, 4), (200, 10, 10)).save(path, format_)
    asked = read(messages=[{"role": "user", "content": [image_part(path.read_bytes(), kind)]}])
    assert [image.size for image in asked.images] == [(5, 4)]
    assert asked.messages == ({"role": "user", "content": "<image>"},)


def test_what_common_clients_send_by_default_changes_nothing():
    fields = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "prompt_cache_key": "k",
        "tools": [],
        "tool_choice": "auto",
        "reasoning_effort": "medium",
        "verbosity": "medium",
        "chat_template_kwargs": {"enable_thinking": True},
        "repetition_penalty": 1.0,
        "skip_special_tokens": True,
    }
    assert read(**fields) == read()


def test_developer_is_system_and_an_assistant_may_have_said_nothing():
    messages = [
        {"role": "developer", "content": "Think."},
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": None, "refusal": None},
        *MESSAGES,
    ]
    assert read(messages=messages).messages == (
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "hello"},
    )


def test_special_tokens_are_left_out_unless_they_are_asked_for():
    assert read().skip_special_tokens is True
    assert read(skip_special_tokens=False).skip_special_tokens is False
    with pytest.raises(RequestError, match="skip_special_tokens='no'; accepted: true or false"):
        read(skip_special_tokens="no")


def test_the_models_own_words_are_no_image():
    said = [*MESSAGES, {"role": "assistant", "content": "an <image> of"}, *MESSAGES]
    assert read(messages=said).messages[1]["content"] == "an  of"


def test_other_models_and_too_many_images_are_refused():
    with pytest.raises(RequestError, match="model='gpt' is not served here; accepted: 'tiny'") as caught:
        read(model="gpt")
    assert caught.value.status == 404
    with pytest.raises(RequestError, match="more than 16 images") as caught:
        read(messages=[{"role": "user", "content": [image_part()] * 17}])
    assert caught.value.status == 413


def test_messages_become_the_prompt_they_were_made_of():
    """A prompt of our own shards, sent by openai_messages, is read as it was."""
    prompt = (
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "<image>\nWhat is it? And <image> there?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "<image><image>\nand now?"},
    )
    images = [tiny_png(seed) for seed in range(3)] + [tiny_png(9)]
    asked = read_chat_request({"messages": openai_messages(prompt, images)}, SERVED)
    assert asked.messages == prompt
    assert len(asked.images) == 4


def test_a_text_after_an_image_begins_a_line_as_in_the_training_data():
    content = [image_part(), {"type": "text", "text": "What is it?"}]
    assert read(messages=[{"role": "user", "content": content}]).messages[0]["content"] == "<image>\nWhat is it?"
    content = [{"type": "text", "text": "See "}, image_part(), {"type": "text", "text": " here"}]
    assert read(messages=[{"role": "user", "content": content}]).messages[0]["content"] == "See <image> here"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = [
    "messages",
    "model",
    "n",
    "stop",
    "seed",
    "top_p",
    "stream",
    "stream_options",
    "max_tokens",
    "logit_bias",
    "x",
    "\ud800",
]


@settings(max_examples=300, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4))
def test_whatever_is_sent_is_taken_or_refused_and_never_crashes(fields):
    refused = None
    try:
        read(**fields)
    except RequestError as error:
        refused = error
    assert (
        refused is None
        or json.dumps(error_body(refused.status, str(refused), param=refused.param), ensure_ascii=False).encode()
    )
    assert refused is None or 400 <= refused.status < 500
