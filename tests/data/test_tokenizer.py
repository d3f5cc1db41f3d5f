from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_r1v2.data.samples import SampleError
from megatron_r1v2.data.tokenizer import ChatTokenizer
from tests.tiny import CHAT_TEMPLATE, CONTROL_TOKENS, name_qwen_tokenizer, split_tokenizer_json, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_think_tag_that_the_template_gives_is_not_given_twice(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    plain = tokenizer.encode_response("left 3</think>8", "<|im_end|>")
    for text in ("<think>\nleft 3</think>8", "<think>left 3</think>8", "\n <think>\nleft 3</think>8"):
        assert tokenizer.encode_response(text, "<|im_end|>") == plain
    # One newline alone belongs to the tag, and a tag in the middle to the text.
    for text in ("left 3</think>8", "\nleft 3</think>8", "so <think>left</think>8"):
        assert tokenizer.without_second_think(text) == text
    assert tokenizer.without_second_think("<think>\n\na") == "\na"
    assert tokenizer.opens_think
    folder = tiny_tokenizer(tmp_path)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<think>\\n", "").replace("<think>\n", ""))
    other = ChatTokenizer(folder)
    assert not other.opens_think
    assert other.without_second_think("<think>\nleft 3</think>8") == "<think>\nleft 3</think>8"


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


# DeepSeek-R1's own, less its tools: a refused system message stands for templates that know no such role.
DEEPSEEK_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '<\uff5cUser\uff5c>' + message['content'] }}{% else %}"
    "{{ '<\uff5cAssistant\uff5c>' + message['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\\n' }}{% endif %}"
)


def test_marks_of_a_turn_are_found_in_the_template_though_the_tokenizer_does_not_mark_them(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path, chat_template=DEEPSEEK_TEMPLATE)
    raw = AutoTokenizer.from_pretrained(folder)
    marks = ["<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"]
    raw.add_tokens([*marks, "  ", "<tool_call>"])
    raw.save_pretrained(folder)
    tokenizer = ChatTokenizer(folder)
    assert set(tokenizer.control_tokens) >= set(marks)
    for mark in marks:
        with pytest.raises(SampleError, match=mark):
            tokenizer.encode_prompt([user(f"a{mark}b")], [], 4)
        assert tokenizer.token_id(mark) in tokenizer.special_ids
    for text in ("a  b", "<think>", "</think>", "<tool_call>"):
        assert text in tokenizer.decode(tokenizer.encode_prompt([user(text)], [], 4))
    said = f"3{marks[0][:4]}{marks[1]}{marks[0][4:]}4</think>"
    assert tokenizer.without_control(said) == "34</think>"


def test_a_reasoning_token_is_text_whatever_template_and_tokenizer_say(tmp_path: Path) -> None:
    always = CHAT_TEMPLATE.replace("{{ message['content'] }}", "<think></think>{{ message['content'] }}")
    folder = tiny_tokenizer(tmp_path, chat_template=always)
    settings = json.loads((folder / "tokenizer.json").read_text())
    for token in settings["added_tokens"]:
        token["special"] = True
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    assert set(ChatTokenizer(folder).control_tokens) == set(CONTROL_TOKENS)


@pytest.mark.parametrize(
    ("stated", "ends"),
    [
        ({"eos_token_id": ["<|endoftext|>", "<|im_end|>"]}, ["<|endoftext|>", "<|im_end|>"]),
        ({"eos_token_id": "<|endoftext|>"}, ["<|endoftext|>"]),
        ({"eos_token_id": []}, ["<|im_end|>"]),
        ({"temperature": 0.6}, ["<|im_end|>"]),
        (None, ["<|im_end|>"]),
    ],
)
def test_the_folder_says_which_tokens_end_a_response(tmp_path: Path, stated: dict | None, ends: list[str]) -> None:
    tokenizer = ChatTokenizer(tiny_tokenizer(tmp_path))
    if stated is not None:
        named = stated.get("eos_token_id")
        ids = [tokenizer.token_id(text) for text in named] if isinstance(named, list) else named
        ids = tokenizer.token_id(ids) if isinstance(ids, str) else ids
        (tmp_path / "generation_config.json").write_text(json.dumps(stated | ({"eos_token_id": ids} if named else {})))
    assert [tokenizer.decode([number]) for number in tokenizer.stop_ids([])] == ends
    assert tokenizer.turn_end([]) == ("<|im_end|>" if "<|im_end|>" in ends else ends[0])
    added = tokenizer.stop_ids(["</think>"])
    assert [tokenizer.decode([number]) for number in added] == ["</think>", *ends]
    assert tokenizer.turn_end(["</think>"]) == "</think>"
    told = tokenizer.describe_ends(added)
    assert f"</think> ({added[0]}), {ends[0]} ({added[1]})" in told
    assert ("<|im_end|> (257) does not" in told.replace(str(tokenizer.stop_ids(["<|im_end|>"])[0]), "257")) == (
        "<|im_end|>" not in ends
    )


def test_the_digest_changes_with_vocabulary_template_and_ends(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path / "first")
    digest = ChatTokenizer(folder).digest
    assert ChatTokenizer(shutil.copytree(folder, tmp_path / "moved")).digest == digest
    for change in ("template", "ends", "vocabulary"):
        changed = shutil.copytree(folder, tmp_path / change)
        if change == "template":
            (changed / "chat_template.jinja").write_text((folder / "chat_template.jinja").read_text() + " ")
        elif change == "ends":
            (changed / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
        else:
            tokenizer = AutoTokenizer.from_pretrained(changed)
            tokenizer.add_tokens(["<|another|>"])
            tokenizer.save_pretrained(changed)
        assert ChatTokenizer(changed).digest != digest, change


@pytest.mark.parametrize(
    "content", ['{"eos_token_id": "x"}', '{"eos_token_id": [true]}', "{", "[]", '{"eos_token_id": -1}', "7"]
)
def test_a_damaged_generation_config_is_named(tmp_path: Path, content: str) -> None:
    tokenizer = ChatTokenizer(tiny_tokenizer(tmp_path))
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config.json (has eos_token_id=|is not valid JSON)"):
        tokenizer.stop_ids([])


def test_ends_beyond_the_tokenizer_are_never_drawn(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(tiny_tokenizer(tmp_path))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [99999]}')
    assert tokenizer.stop_ids([]) == [tokenizer.token_id("<|im_end|>")]


def test_an_error_about_an_end_names_the_setting(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"generation.stop_tokens=\['abc'\]: .*'abc' must be one token"):
        ChatTokenizer(folder).stop_ids(["abc"])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"generation.stop_tokens is empty, and neither generation_config.json"):
        ChatTokenizer(folder).stop_ids([])


def test_special_tokens_among_texts_are_found(tokenizer: ChatTokenizer) -> None:
    found = tokenizer.special_ids_of(["<|im_start|>", "</think>", "8", "<|im_end"])
    assert found == {tokenizer.token_id("<|im_start|>")}
    assert tokenizer.token_id("</think>") not in tokenizer.special_ids


def test_a_folder_with_vocab_and_merges_alone_is_the_same_tokenizer(tmp_path: Path) -> None:
    whole = tiny_tokenizer(tmp_path / "whole")
    name_qwen_tokenizer(whole)
    shutil.copytree(whole, tmp_path / "old")
    split_tokenizer_json(tmp_path / "old")
    one, other = ChatTokenizer(whole), ChatTokenizer(tmp_path / "old")
    text = "left 3, na\u00efve <think>8</think>"
    assert one.encode_text(text) == other.encode_text(text)
    assert one.control_tokens == other.control_tokens
    assert one.image_token_id == other.image_token_id


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


@pytest.mark.parametrize("model_type", ["skywork_chat", "internvl_chat"])
def test_a_model_type_that_transformers_lacks_does_not_frighten(tmp_path: Path, model_type: str) -> None:
    """Its warning that the model "can yield errors" is about a model that we read ourselves; others stay."""
    folder = tiny_tokenizer(tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    log, told = logging.getLogger("transformers.configuration_utils"), []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    log.addHandler(handler)
    try:
        ChatTokenizer(folder)
        assert told == []
        AutoTokenizer.from_pretrained(str(folder))
        log.warning("something else")
    finally:
        log.removeHandler(handler)
    assert any(model_type in text for text in told), "the filter is for our own loading, and needed"
    assert told[-1] == "something else"
