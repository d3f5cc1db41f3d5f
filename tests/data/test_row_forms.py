"""The forms of rows that people have, each read as its author meant it, or refused by its column."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_r1v2.data.row_forms import RowForm, sample_fields
from megatron_r1v2.data.samples import SampleError

USER = {"role": "user", "content": "<image>\nWhat?"}
URL = {"type": "image_url", "image_url": {"url": "a.png"}}


def read(row: dict[str, Any], **wishes: Any) -> dict[str, Any]:
    """Return the fields of a row that say something."""
    fields = sample_fields(row, RowForm(**wishes))
    return {name: value for name, value in fields.items() if value not in (None, "", (), {}, [], False)}


ASKED = {"messages": (USER,), "images": ["a.png"], "answer": "8", "answer_type": "math"}
PAIR = {"messages": (USER,), "images": ["a.png"], "answer_type": "math", "chosen": "a", "rejected": "b"}
FORMS = {
    "plain": ({"image": "a.png", "question": "What?", "answer": "8"}, ASKED),
    "a number as the answer": ({"images": ["a.png"], "problem": "What?", "answer": 8}, ASKED),
    "a placeholder": ({"images": ["a.png"], "problem": "<image>\nWhat?", "answer": "8"}, ASKED),
    "verl": (
        {"data_source": "g", "prompt": [USER], "images": [{"path": "a.png"}], "reward_model": {"ground_truth": 8}},
        {**ASKED, "images": [{"path": "a.png"}], "source": "g"},
    ),
    "verl with image": (
        {"prompt": [{**USER, "content": "What?"}], "image": "a.png", "reward_model": {"ground_truth": "8"}},
        ASKED,
    ),
    "MMPR with images": ({"question": "What?", "chosen": "a", "rejected": "b", "images": ["a.png"]}, PAIR),
    "MMPR with thoughts": (
        {"question": "What?", "chosen": "<think>x</think>a", "rejected": "<think>\ny</think>", "image": "a.png"},
        {**PAIR, "chosen": "<think>x</think>a", "rejected": "<think>\ny</think>"},
    ),
    "LLaVA": (
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Eight."}],
        },
        {"messages": (USER,), "images": ["a.png"], "answer_type": "math", "response": "Eight."},
    ),
    "InternVL with a system turn and two rounds": (
        {
            "image": ["a.png"],
            "conversations": [
                {"from": "system", "value": "Think."}, {"from": "human", "value": "What?"},
                {"from": "gpt", "value": "8"}, {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."},
            ],
        },
        {
            "messages": (
                {"role": "system", "content": "Think."}, USER, {"role": "assistant", "content": "8"},
                {"role": "user", "content": "Sure?"},
            ),
            "images": ["a.png"], "answer_type": "math", "response": "Yes.",
        },
    ),
    "ms-swift": ({"messages": [USER], "images": ["a.png"], "solution": "8"}, ASKED),
    "ms-swift pairs": (
        {"messages": [USER, {"role": "assistant", "content": "a"}], "rejected_response": "b", "images": ["a.png"]},
        PAIR,
    ),
    "OpenAI content list": (
        {
            "messages": [{"role": "user", "content": [URL, {"type": "text", "text": "\nWhat?"}]}],
            "answer": "8",
        },
        {**ASKED, "images": [{"url": "a.png"}]},
    ),
    "content list with the images beside": (
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]}],
            "images": ["a.png"], "answer": "8",
        },
        ASKED,
    ),
    "TRL pairs": (
        {"prompt": [USER], "chosen": [{"role": "assistant", "content": "a"}],
         "rejected": [{"role": "assistant", "content": "b"}], "images": ["a.png"]},
        PAIR,
    ),
    "TRL pairs with the prompt inside": (
        {"chosen": [USER, {"role": "assistant", "content": "a"}],
         "rejected": [USER, {"role": "assistant", "content": "b"}], "images": ["a.png"]},
        PAIR,
    ),
    "several right answers": (
        {"question": "q", "answers": ["8", "eight", "8", 8.0]},
        {"messages": ({"role": "user", "content": "q"},), "answer": "8", "alternatives": ("eight", "8.0"),
         "answer_type": "math"},
    ),
    "further columns": (
        {"question": "q", "answer": "8", "level": 3, "topic": "art", "none": None, "key": "k",
         "extra_info": {"index": 0}},
        {"messages": ({"role": "user", "content": "q"},), "answer": "8", "answer_type": "math", "key": "k",
         "metadata": {"level": "3", "topic": "art", "extra_info": '{"index": 0}'}},
    ),
    "columns that parquet left empty": (
        {"question": "q", "answer": "8", "image": None, "images": [], "chosen": None, "messages": None},
        {"messages": ({"role": "user", "content": "q"},), "answer": "8", "answer_type": "math"},
    ),
    "ours without a placeholder": (
        {"messages": [{"role": "user", "content": "What?"}], "answer": "8", "answer_type": "math", "images": ["a.png"]},
        ASKED,
    ),
}  # fmt: skip


def test_an_id_is_metadata_unless_it_is_named_as_the_key():
    row = {"id": 7, "image": "a.png", "question": "What?", "answer": "8"}
    assert read(row) == {**ASKED, "metadata": {"id": "7"}}
    assert read(row, columns={"key": "id"}) == {**ASKED, "key": "7"}


@pytest.mark.parametrize(("row", "expected"), FORMS.values(), ids=FORMS.keys())
def test_a_row_of_each_form(row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read(row) == expected


REFUSED = {
    "reward_model.ground_truth is None": {"prompt": [USER], "reward_model": {"ground_truth": None}},
    "reward_model.ground_truth is nan": {"prompt": [USER], "reward_model": {"ground_truth": float("nan")}},
    "ground_truth is {'target'": {"prompt": [USER], "reward_model": {"ground_truth": {"target": ["8"]}}},
    "answer is None": {"question": "q", "answer": None, "response": "r"},
    "answer is inf": {"question": "q", "answer": float("inf")},
    "answer is True": {"question": "q", "answer": True},
    "answers is None; accepted are a text": {"question": "q", "answers": ["8", None]},
    "answers is an empty list": {"question": "q", "answers": []},
    "no answer (looked for answer": {"question": "q"},
    "no answer": {"question": "q", "answer": " "},
    "reward_model has no ground_truth, only style": {"prompt": [USER], "reward_model": {"style": "rule"}},
    "column 'img' holds or names an image": {"question": "q", "answer": "8", "img": "a.png"},
    "column 'picture' holds": {"question": "q", "answer": "8", "picture": {"bytes": b"x", "path": None}},
    "column 'image_2' holds": {"question": "q", "answer": "8", "image": "a.png", "image_2": "b.png"},
    "column 'videos' holds": {"question": "q", "answer": "8", "videos": ["a.mp4"]},
    "column 'extra_info' holds": {"question": "q", "answer": "8", "extra_info": {"img": ["a.jpg"]}},
    "column 'options' has options": {"question": "q", "answer": "A", "options": ["1", "2"]},
    "images are under image and under images": {"question": "q", "answer": "8", "image": "a.png", "images": ["b.png"]},
    "images are in the messages and in the column 'image'": {
        "messages": [{"role": "user", "content": [URL]}], "answer": "8", "image": "b.png",
    },
    "must be text, image or image_url": {"messages": [{"role": "user", "content": [{"type": "audio"}]}], "answer": "8"},
    "chosen and rejected are equal": {"question": "q", "chosen": "a", "rejected": "a"},
    "rejected is empty": {"question": "q", "chosen": "a", "rejected": " "},
    "chosen is there without the other": {"question": "q", "chosen": "a"},
    "rejected opens <think> and never closes it": {"question": "q", "chosen": "a", "rejected": "<think>\nb"},
    "column question has half of a character, '\\ud83d', at place 6": {"question": "What \ud83d", "answer": "8"},
    "column extra.a has half": {"question": "q", "answer": "8", "extra": {"a": ["\udc00"]}},
    "expected a list of messages": {"prompt": [], "answer": "8"},
    "question is empty": {"question": " ", "answer": "8"},
}  # fmt: skip


@pytest.mark.parametrize(("message", "row"), REFUSED.items(), ids=REFUSED.keys())
def test_a_row_that_would_teach_something_else_is_refused(message: str, row: dict[str, Any]) -> None:
    with pytest.raises(SampleError) as refused:
        read(row)
    assert message in str(refused.value)


def test_the_wishes_of_the_user() -> None:
    row = {"q": "What?", "gold": "8", "img": "a.png", "img2": "b.png", "options": ["x", "y"], "thing": "t"}
    fields = read(
        row,
        columns={"question": "q", "answer": "gold", "image": "img", "source": "thing"},
        ignored=frozenset(["img2"]),
        template="{question} {options}",
        answer_type="exact",
    )
    assert fields["messages"] == ({"role": "user", "content": '<image>\nWhat? ["x", "y"]'},)
    assert (fields["answer"], fields["answer_type"], fields["source"], fields["images"]) == (
        "8",
        "exact",
        "t",
        ["a.png"],
    )
    ours = {"messages": [USER], "answer": "8", "answer_type": "choice", "img": ["a.png"], "id": "k"}
    fields = read(ours, columns={"image": "img", "key": "id"})
    assert [fields[name] for name in ("answer_type", "images", "key")] == ["choice", ["a.png"], "k"]
    with pytest.raises(SampleError, match=r"--columns image=pic: the row has no column 'pic', only answer"):
        read(ours, columns={"image": "pic"})
    nested = read({"question": "q", "more": {"gold": "8"}}, columns={"answer": "more.gold"})
    assert nested["answer"] == "8"
    unclosed = {"question": "q", "chosen": "<think>a", "rejected": "b"}
    accepted = read(unclosed, unclosed_think=True)
    assert (accepted["chosen"], accepted["unclosed_think"]) == ("<think>a", True)
    closed = {"question": "q", "chosen": "x</think>a", "rejected": "y</think>b"}
    assert not sample_fields(closed, RowForm(unclosed_think=True))["unclosed_think"]
    assert sample_fields({"question": "q"}, RowForm(no_answer=True))["answer_type"] is None
    assert sample_fields({"prompt": "q", "reward_model": {}}, RowForm(no_answer=True))["answer_type"] is None
