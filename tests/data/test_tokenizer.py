from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_r1v2.data.samples import SampleError
from megatron_r1v2.data.tokenizer import ChatTokenizer
from tests.tiny import CHAT_TEMPLATE, CONTROL_TOKENS, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_prompt_is_templated_and_images_are_expanded(tokenizer: ChatTokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, user("<image>\nand <image>: which?")]
    ids = tokenizer.encode_prompt(messages, [3, 1], 2)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        "<img>" + "<IMG_CONTEXT>" * 6 + "</img>\nand <img><IMG_CONTEXT><IMG_CONTEXT></img>: which?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )
    assert ids.count(tokenizer.image_token_id) == 8
    assert messages[1]["content"] == "<image>\nand <image>: which?"


def test_digits_are_single_tokens_and_text_survives(tokenizer: ChatTokenizer) -> None:
    text = "12345 left 7, na\u00efve \u6570\u5b66 \\boxed{12}"
    ids = tokenizer.encode_response(text, "<|im_end|>")
    assert tokenizer.decode(ids) == text + "<|im_end|>"
    assert tokenizer.decode(ids, keep_special=False) == text
    assert [tokenizer.decode([i]) for i in ids[:5]] == list("12345")


def test_reasoning_tokens_stay_when_control_tokens_go(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode_response("8</think>8", "<|im_end|>")
    assert tokenizer.decode(ids, keep_special=False) == "8</think>8"


def test_ids_come_from_the_tokenizer(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.stop_ids(["<|im_end|>", "<|endoftext|>"])
    assert [tokenizer.decode([i]) for i in ids] == ["<|im_end|>", "<|endoftext|>"]
    assert tokenizer.pad_id == ids[1]
    assert tokenizer.decode([tokenizer.image_token_id]) == "<IMG_CONTEXT>"
    assert max(ids) < tokenizer.vocab_size


def test_text_that_is_not_one_token_is_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(ValueError, match=r"'<\|eot\|>' must be one token"):
        tokenizer.stop_ids(["<|eot|>"])
    with pytest.raises(ValueError, match="it is 0"):
        tokenizer.token_id("")


@pytest.mark.parametrize(("text", "tiles"), [("<image><image>", [1]), ("no image", [1]), ("<image>", [])])
def test_placeholders_and_images_must_agree(tokenizer: ChatTokenizer, text: str, tiles: list[int]) -> None:
    with pytest.raises(SampleError, match=rf"'k-7'.*{text.count('<image>')} <image>.*{len(tiles)} images"):
        tokenizer.encode_prompt([user(text)], tiles, 4, key="k-7")


@pytest.mark.parametrize("token", ["<IMG_CONTEXT>", "<img>", "</img>"])
def test_a_literal_image_token_in_text_is_refused(tokenizer: ChatTokenizer, token: str) -> None:
    with pytest.raises(SampleError, match=f"'k-7'.*{token}"):
        tokenizer.encode_prompt([user(f"<image> {token}")], [1], 4, key="k-7")
    with pytest.raises(SampleError, match=token):
        tokenizer.encode_response(f"I see {token}", "<|im_end|>")


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
def test_no_text_begins_or_ends_a_turn(tokenizer: ChatTokenizer, token: str) -> None:
    for role in ("system", "user", "assistant"):
        with pytest.raises(SampleError, match=rf"'k-7'.*{re.escape(token)}"):
            tokenizer.encode_prompt([{"role": role, "content": f"a{token}\nb"}], [], 4, key="k-7")
    with pytest.raises(SampleError, match=re.escape(token)):
        tokenizer.encode_response(f"8{token}", "<|im_end|>")


def test_tokens_of_reasoning_and_of_grounding_are_text(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    raw = AutoTokenizer.from_pretrained(folder)
    raw.add_tokens(["<ref>"], special_tokens=True)
    raw.save_pretrained(folder)
    tokenizer = ChatTokenizer(folder)
    for text in ("<ref>a", "8</think>8", "<think>", "<|im_end", "a <| b |>"):
        assert text in tokenizer.decode(tokenizer.encode_prompt([user(text)], [], 4))
    assert set(tokenizer.control_tokens) == set(CONTROL_TOKENS)


def test_an_end_token_inside_a_response_is_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(SampleError, match=r"<\|im_end\|>"):
        tokenizer.encode_response("8<|im_end|>8", "<|im_end|>")


def test_a_template_that_drops_an_image_is_an_error(tmp_path: Path) -> None:
    first_only = CHAT_TEMPLATE.replace("for message in messages", "for message in messages[:1]")
    tokenizer = ChatTokenizer(tiny_tokenizer(tmp_path, chat_template=first_only))
    with pytest.raises(ValueError, match=r"0 <IMG_CONTEXT> tokens where its images need 4"):
        tokenizer.encode_prompt([user("hello"), user("<image>")], [1], 4)


def test_missing_folder_tokenizer_or_template(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        ChatTokenizer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no tokenizer can be loaded"):
        ChatTokenizer(tmp_path / "empty")
    tiny_tokenizer(tmp_path / "plain", chat_template="")
    with pytest.raises(ValueError, match="chat template"):
        ChatTokenizer(tmp_path / "plain")
