"""The text sent of a response: whole characters, nothing of a stop string, each token's log-prob once; and the JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.generation.tokens import DrawnToken
from megatron_r1v2.serve.chat_answer import ChatAnswer, ChoiceText, ReasoningSplit, TextDecoder, event
from megatron_r1v2.serve.chat_request import ChatRequest
from tests.tiny_hf import tiny_byte_tokenizer

TOKENIZER = tiny_byte_tokenizer()
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
TOKEN_OF_BYTE = [TOKENIZER.encode(bytes([value]).decode("latin-1"), add_special_tokens=False) for value in range(128)]
BYTE_OF_TOKEN = {tokens[0]: value for value, tokens in enumerate(TOKEN_OF_BYTE)}


def decode(ids) -> str:
    return str(TOKENIZER.decode(list(ids), skip_special_tokens=False))


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def read(ids, *, stop=(), ended=True) -> tuple[ChoiceText, list]:
    """Feed tokens until the response ends; the last one ends it in the engine where `ended`."""
    choice = ChoiceText(decode, stop_ids=frozenset({END}), stop=stop)
    pieces = []
    for place, token_id in enumerate(ids):
        pieces.append(choice.push(DrawnToken(0, token_id, -float(place), is_last=ended and place == len(ids) - 1)))
        if choice.finish_reason:
            break
    return choice, pieces


def text_of(pieces) -> str:
    return "".join(piece.text for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 255), max_size=60))
def test_parts_of_any_bytes_are_the_text_of_all(ids):
    decoder = TextDecoder(decode)
    assert "".join([decoder.push(token) for token in ids]) + decoder.finish() == decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_no_part_is_half_a_character(text):
    decoder = TextDecoder(decode)
    parts = [decoder.push(token) for token in encode(text)]
    assert "".join(parts) + decoder.finish() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


def test_bytes_that_never_make_a_character_cost_no_more_than_a_window():
    lengths = []

    def counting(ids) -> str:
        lengths.append(len(ids))
        return decode(ids)

    lone = next(token for token in range(256) if decode([token]) == "\ufffd")
    decoder = TextDecoder(counting)
    text = "".join(decoder.push(lone) for _ in range(500)) + decoder.finish()
    assert text == decode([lone] * 500)
    assert max(lengths) < 100


ALPHABET = st.text(alphabet="ab<|\u20ac", max_size=30)


@settings(max_examples=400, deadline=None)
@given(
    text=ALPHABET, stop=st.lists(st.text(alphabet="ab<|\u20ac", min_size=1, max_size=4), max_size=3), end=st.booleans()
)
def test_stop_strings_cut_where_a_search_of_the_whole_text_would(text, stop, end):
    ids = encode(text) + ([END] if end else [])
    if not ids:
        return
    choice, pieces = read(ids, stop=stop)
    # Every prefix of whole tokens is searched, as a reader of the stream would.
    expected, reason = text, "stop" if end else "length"
    for count in range(1, len(ids) + 1):
        so_far = decode(ids[:count]).removesuffix("\ufffd").removesuffix("<|im_end|>")
        places = [so_far.find(one) for one in stop if one in so_far]
        if places:
            expected, reason = so_far[: min(places)], "stop"
            break
    assert text_of(pieces) == expected
    assert choice.finish_reason == reason
    told = [token for piece in pieces for token in piece.tokens]
    assert [token.log_prob for token in told] == [-float(place) for place in range(len(told))], "each once, in order"
    assert len(decode([token.token_id for token in told]).rstrip("\ufffd")) >= len(expected.rstrip("\ufffd"))


def test_what_may_begin_a_stop_string_is_held_back_and_given_when_it_does_not():
    choice, pieces = read(encode("one STO two STOP three"), stop=["STOP"], ended=False)
    assert text_of(pieces) == "one STO two "
    assert choice.finish_reason == "stop"
    texts = [piece.text for piece in pieces]
    assert texts[4:8] == ["", "", "", "STO "]
    assert choice.num_tokens == len("one STO two STOP")


def test_a_held_back_end_is_told_at_the_limit():
    choice, pieces = read(encode("so ST"), stop=["STOP"])
    assert (text_of(pieces), choice.finish_reason) == ("so ST", "length")
    assert len([token for piece in pieces for token in piece.tokens]) == 5


@pytest.mark.parametrize("ended", [True, False])
def test_a_stop_token_is_counted_but_not_told(ended):
    choice, pieces = read([*encode("ok"), END], ended=True)
    assert (text_of(pieces), choice.finish_reason, choice.num_tokens) == ("ok", "stop", 3)
    assert len([token for piece in pieces for token in piece.tokens]) == 2


def test_half_a_character_at_the_limit_is_told_as_a_decoder_tells_it():
    ids = encode("a\u20ac")[:3]
    choice, pieces = read(ids)
    assert text_of(pieces) == decode(ids) == "a\ufffd"
    assert choice.finish_reason == "length"


def test_a_token_without_text_at_the_end_is_told_too():
    words = {1: "one", 2: ""}
    choice = ChoiceText(lambda ids: "".join(words[token] for token in ids), stop_ids=frozenset(), stop=[])
    pieces = [choice.push(DrawnToken(0, token, 0.0, is_last=token == 2)) for token in (1, 2)]
    assert [token.token_id for piece in pieces for token in piece.tokens] == [1, 2]


def special(name: str) -> int:
    return int(TOKENIZER.convert_tokens_to_ids(name))


def test_hidden_tokens_have_no_text_but_are_counted_and_told():
    hidden = frozenset({special("<|im_start|>")})
    ids = [*encode("a"), special("<|im_start|>"), *encode("b"), END]
    choice = ChoiceText(decode, stop_ids=frozenset({END}), stop=["<|im"], hidden_ids=hidden)
    pieces = [choice.push(DrawnToken(0, token, 0.0, is_last=token == END)) for token in ids]
    assert (text_of(pieces), choice.num_tokens, choice.finish_reason) == ("ab", 4, "stop")
    assert [token.token_id for piece in pieces for token in piece.tokens] == ids[:3]


def test_a_stop_token_of_the_request_ends_a_response_that_the_engine_goes_on_with():
    choice = ChoiceText(decode, stop_ids=frozenset({END, special("<|im_start|>")}), stop=())
    pieces = [choice.push(DrawnToken(0, token, 0.0)) for token in (*encode("a\u20ac")[:2], special("<|im_start|>"))]
    assert (text_of(pieces), choice.finish_reason) == ("a\ufffd", "stop")


THINK_END = "</t>"


def split_parts(parts, ends=THINK_END):
    split = ReasoningSplit(ends)
    told = [split.push(part, is_last=place == len(parts) - 1) for place, part in enumerate(parts)]
    return told, split.has_ended


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.text(alphabet="a</t>", max_size=5), min_size=1, max_size=8))
def test_parts_give_what_the_whole_text_gives(parts):
    told, has_ended = split_parts(parts)
    reasoning, found, answer = "".join(parts).partition(THINK_END)
    assert "".join(one for one, _ in told) == reasoning
    assert "".join(one for _, one in told) == answer
    assert has_ended == bool(found)


def test_what_may_begin_the_end_is_held_back_and_given_when_it_does_not():
    told, _ = split_parts(["so <", "/", "b> and </", "t>", "8"])
    assert told == [("so ", ""), ("", ""), ("</b> and ", ""), ("", ""), ("", "8")]


def test_only_the_first_end_counts_and_without_one_to_look_for_all_is_the_answer():
    assert split_parts(["a</t>b</t>c"])[0] == [("a", "b</t>c")]
    assert split_parts(["a</t>", "b"], ends="") == ([("", "a</t>"), ("", "b")], True)


MESSAGES = [{"role": "user", "content": "?"}]


def drawn(text):
    """Return the tokens of a response that ends."""
    ids = [*encode(text), END]
    return [DrawnToken(0, token, -0.5, ((token, -0.5), (END, -1.5)), token == END) for token in ids]


def answer_of(texts, *, reasoning_ends="", push=True, **fields):
    """Return an answer and its pieces; each response is a text and the stop token."""
    request = ChatRequest.model_validate({"messages": MESSAGES, "model": "tiny", "n": len(texts), **fields})
    answer = ChatAnswer(
        request, decode=decode, prompt_tokens=7, stop_ids=frozenset({END}), reasoning_ends=reasoning_ends
    )
    choices = zip(answer.choices, texts, strict=True) if push else ()
    return answer, [[choice.push(token) for token in drawn(text)] for choice, text in choices]


def test_a_whole_answer_has_every_response_with_its_log_probs_and_counts():
    answer, pieces = answer_of(["ab", "c"], logprobs=True, top_logprobs=2)
    told = answer.whole(pieces)
    assert (told["object"], told["model"]) == ("chat.completion", "tiny")
    assert [choice["message"] for choice in told["choices"]] == [
        {"role": "assistant", "content": text, "refusal": None} for text in ("ab", "c")
    ]
    assert [(choice["index"], choice["finish_reason"]) for choice in told["choices"]] == [(0, "stop"), (1, "stop")]
    first, second = told["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["logprob"], first["bytes"]) == ("a", -0.5, [97])
    assert [one["logprob"] for one in second["top_logprobs"]] == [-0.5, -1.5]
    assert told["usage"] == {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
    assert answer_of(["ab"])[0].whole(answer_of(["ab"])[1])["choices"][0]["logprobs"] is None


def test_half_a_character_has_no_bytes():
    answer, pieces = answer_of(["\u20ac"], logprobs=True)
    told = answer.whole(pieces)["choices"][0]["logprobs"]["content"]
    assert [one["bytes"] for one in told] == [None] * 3


def test_an_answer_without_an_end_of_the_reasoning_is_null():
    answer, pieces = answer_of(["a</t>b", "ab", "a</t>"], reasoning_ends=THINK_END)
    told = [choice["message"] for choice in answer.whole(pieces)["choices"]]
    assert [(one["reasoning_content"], one["content"]) for one in told] == [("a", "b"), ("ab", None), ("a", "")]


def test_chunks_put_together_are_the_whole_answer():
    options = {"include_usage": True}
    answer, _ = answer_of(["a</t>b"], reasoning_ends=THINK_END, stream_options=options, push=False)
    assert answer.includes_usage
    assert answer.opening(0)["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    chunks = [answer.piece(0, answer.choices[0].push(token))["choices"][0] for token in drawn("a</t>b")]
    deltas = [chunk["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "a"
    assert "".join(delta.get("content", "") for delta in deltas) == "b"
    assert chunks[-1]["finish_reason"] == "stop"
    last = answer.usage_chunk()
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 7)
    head, _, body = event(last).partition(" ")
    assert (head, json.loads(body), event(last)[-2:]) == ("data:", last, "\n\n")
