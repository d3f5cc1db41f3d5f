from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_r1v2.data.samples import SampleError, encode_record, parse_sample
from tests.tiny import tiny_sample

RECORD = json.loads(encode_record(tiny_sample(7)))


def parse(**changes: Any) -> None:
    record = {name: value for name, value in {**RECORD, **changes}.items() if value is not ...}
    parse_sample("k-1", {"json": json.dumps(record).encode(), "0.png": b"x"})


def test_a_sample_survives_writing_and_reading() -> None:
    pair = {"chosen": "a", "rejected": "b", "margin": 1.5, "unclosed_think": True}
    sample = tiny_sample(7, **pair, source="here", tolerances=(0.1, 0.0))
    assert parse_sample(sample.key, {"json": encode_record(sample), **sample.images}) == sample
    text_only = tiny_sample(8, images={}, messages=({"role": "user", "content": "1 + 1?"},), response=None)
    assert parse_sample(text_only.key, {"json": encode_record(text_only)}) == text_only


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema is 2, accepted is 1"),
        ({"answer": ...}, "lacks answer"),
        ({"respones": "8"}, "unknown field 'respones'"),
        ({"answer": 8}, "answer must be text, got 8"),
        ({"answer": " ", "response": ...}, "answer is empty"),
        ({"answer_type": "number"}, "answer_type is 'number', accepted are numeric, choice, exact, math"),
        ({"answer_type": []}, "answer_type"),
        ({"facts": {"left": 3}}, "facts must map"),
        ({"facts": ["left"]}, "facts must map"),
        ({"margin": "1"}, "margin must be a number"),
        ({"tolerances": 0.1}, "tolerances must be a list of numbers"),
        ({"tolerances": [-0.1]}, "tolerances must be a list of numbers"),
        ({"tolerances": [float("inf")]}, "tolerances must be a list of numbers"),
        ({"tolerances": [True]}, "tolerances must be a list of numbers"),
        ({"response": 8}, "response must be text"),
        ({"images": ["../x.png"]}, "images must be a list of names"),
        ({"images": "0.png"}, "images must be a list of names"),
        ({"images": []}, "1 <image> and there are 0 images"),
        ({"images": ["0.png", "1.png"]}, "1 <image> and there are 2 images"),
        ({"images": ["0.png", "0.png"]}, "twice"),
        ({"images": ["1.png"]}, r"k-1\.1\.png is not in the shard"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hello"}, "at least one message"),
        ({"messages": ["hello"]}, "a message is"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "a message is"),
        ({"messages": [{"role": [], "content": "hi"}]}, "a message is"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a message is"),
        ({"messages": [*RECORD["messages"], {"role": "assistant", "content": "8"}]}, "last message must be the user's"),
    ],
)
def test_what_breaks_the_schema_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SampleError, match=message) as caught:
        parse(**changes)
    assert "'k-1'" in str(caught.value)


def test_a_sample_may_say_that_nothing_is_compared() -> None:
    parse(answer="", answer_type=None, response=...)
    with pytest.raises(SampleError, match="answer_type is None, accepted are"):
        parse(answer="8", answer_type=None)
    with pytest.raises(SampleError, match="margin must be a number, got inf"):
        parse(margin=float("inf"))


def test_a_preference_pair_needs_no_answer() -> None:
    parse(answer="", response=..., chosen="good", rejected="bad")


@pytest.mark.parametrize("data", [b"{", b"[1]", b"\xff\xfe", b""])
def test_bad_json(data: bytes) -> None:
    with pytest.raises(SampleError, match="'k-1'"):
        parse_sample("k-1", {"json": data})


def test_missing_json_lists_what_is_there() -> None:
    with pytest.raises(SampleError, match=r"no k-1\.json.*found: 0\.png"):
        parse_sample("k-1", {"0.png": b"x"})


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "__meta__", "-a", "a" * 81, "a b"])
def test_keys_that_cannot_name_files(key: str) -> None:
    with pytest.raises(SampleError, match="sample key"):
        encode_record(tiny_sample(1, key=key))


def test_equal_samples_give_equal_bytes_whatever_the_order_of_their_fields() -> None:
    one = tiny_sample(1, facts={"left": "1", "right": "0"})
    other = tiny_sample(1, facts={"right": "0", "left": "1"})
    assert one == other
    assert encode_record(one) == encode_record(other)
