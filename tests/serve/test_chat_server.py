"""The server as OpenAI's own client sees it."""

from __future__ import annotations

import base64
import io
import socket
import threading

import openai
import pytest
from PIL import Image

from megatron_r1v2.data.messages import data_url
from tests.serve.running import QUESTION, RESPONSE_TOKENS, ask, get, messages_of, metric, post, stream
from tests.tiny import tiny_png


def test_greedy_answers_are_those_of_the_engine_in_process(run, client):
    for number in (0, 3, 7, 14):
        answer = ask(client, messages_of(run.prompts[number]), temperature=0, logprobs=True)
        choice = answer.choices[0]
        assert choice.message.content == run.texts[number]
        assert answer.usage.prompt_tokens == len(run.prompts[number].token_ids)
        assert answer.usage.completion_tokens == len(run.log_probs[number])
        told = [token.logprob for token in choice.logprobs.content]
        assert told == pytest.approx(run.log_probs[number][: len(told)], abs=2e-5)
        assert "".join(token.token for token in choice.logprobs.content) == run.texts[number]
        assert len(told) == len(run.log_probs[number]) - (choice.finish_reason == "stop")


def test_images_are_looked_at(run, client):
    prompt = run.prompts[0]
    answers = [
        ask(client, openai_like(prompt, tiny_png(seed)), temperature=0, logprobs=True, max_tokens=1) for seed in (1, 2)
    ]
    one, other = (answer.choices[0].logprobs.content[0].logprob for answer in answers)
    assert abs(one - other) > 1e-4


def openai_like(prompt, png: bytes):
    text = prompt.messages[0]["content"].removeprefix("<image>\n")
    image = {"type": "image_url", "image_url": {"url": data_url(png), "detail": "auto"}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def test_a_stream_is_the_answer_in_parts(run, client):
    for number in (1, 13):
        messages = messages_of(run.prompts[number])
        texts, reasons, chunks = stream(
            client, messages, temperature=0, stream_options={"include_usage": True}, logprobs=True, top_logprobs=2
        )
        assert texts == {0: run.texts[number]}
        assert reasons[0] in ("stop", "length")
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].usage.completion_tokens == len(run.log_probs[number])
        told = [
            token
            for chunk in chunks
            for choice in chunk.choices
            if choice.logprobs
            for token in choice.logprobs.content
        ]
        assert [token.logprob for token in told] == pytest.approx(run.log_probs[number][: len(told)], abs=2e-5)
        for token in told:
            assert len(token.top_logprobs) == 2
            assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)
        assert len(chunks) > 3


def test_a_seed_gives_the_same_responses_again_and_each_choice_its_own(client):
    first = ask(client, seed=5, n=4, temperature=1)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert [choice.message.content for choice in ask(client, seed=5, n=4, temperature=1).choices] == texts
    assert stream(client, seed=5, n=4, temperature=1)[0] == dict(enumerate(texts))
    assert [choice.message.content for choice in ask(client, seed=6, n=4, temperature=1).choices] != texts
    assert [choice.message.content for choice in ask(client, n=4).choices] != texts, (
        "a seed is drawn where none is given"
    )


def test_stop_strings_end_a_response_and_are_not_in_it(client):
    asked = {"seed": 3, "temperature": 1, "max_tokens": 30, "extra_body": {"skip_special_tokens": False}}
    whole = ask(client, **asked)
    text = whole.choices[0].message.content
    stop = text[len(text) // 2 : len(text) // 2 + 5]
    expected = text[: text.index(stop)]
    cut = ask(client, **asked, stop=[stop, "never said"], logprobs=True)
    assert cut.choices[0].message.content == expected
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < whole.usage.completion_tokens
    assert "".join(token.token for token in cut.choices[0].logprobs.content).startswith(expected)
    texts, reasons, _ = stream(client, **asked, stop=stop)
    assert (texts[0], reasons[0]) == (expected, "stop")


MARKS = ("<|im_start|>", "<|endoftext|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")


def test_special_tokens_are_served_when_they_are_asked_for_and_an_answer_is_taken_back(client):
    def answers(**extra) -> list[str]:
        asked = ask(client, n=24, temperature=1.5, seed=3, extra_body=extra)
        return [choice.message.content for choice in asked.choices]

    plain, shown = answers(), answers(skip_special_tokens=False)
    assert not [mark for text in plain for mark in MARKS if mark in text]
    marked = [text for text in shown if any(mark in text for mark in MARKS)]
    assert marked, "a model that writes no special token shows nothing"
    assert answers(skip_special_tokens=True) == plain
    for text in (plain[0], marked[0]):
        assert ask(client, [*QUESTION, {"role": "assistant", "content": text}, *QUESTION], max_tokens=1).choices
    with pytest.raises(openai.BadRequestError, match="control tokens"):
        ask(client, [{"role": "user", "content": marked[0]}])


def test_a_special_token_is_a_stop_string_too(client):
    whole = ask(client, n=24, temperature=1.5, seed=3, extra_body={"skip_special_tokens": False})
    index, text = next((c.index, c.message.content) for c in whole.choices if "<|im_start|>" in c.message.content)
    for extra in ({}, {"skip_special_tokens": False}):
        cut = ask(client, n=24, temperature=1.5, seed=3, stop="<|im_start|>", extra_body=extra).choices[index]
        assert cut.finish_reason == "stop"
        assert not extra or cut.message.content == text.partition("<|im_start|>")[0]


def test_limits_end_a_response(client):
    answer = ask(client, seed=1, temperature=1, max_completion_tokens=3, n=2)
    assert answer.usage.completion_tokens <= 6
    assert {choice.finish_reason for choice in answer.choices} <= {"length", "stop"}


def test_models_health_and_metrics(server, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert get(f"{server.url}/health").json() == {"status": "ok", "model": "tiny"}
    ask(client, max_tokens=2)
    assert metric(server, 'r1v2_requests_total{status="200"}') >= 1
    assert metric(server, "r1v2_generated_tokens_total") >= 1
    assert metric(server, "r1v2_open_responses") == 0


def test_a_field_that_is_no_unicode_is_refused_and_counted_as_sent(server):
    counted = [metric(server, f'r1v2_requests_total{{status="{status}"}}') for status in (400, 500)]
    content = b'{"messages": [{"role": "user", "content": "a"}], "\\ud800": 1}'
    headers = {"Authorization": "Bearer secret"}
    answer = post(f"{server.url}/v1/chat/completions", content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "\\ud800")
    assert metric(server, 'r1v2_requests_total{status="400"}') == counted[0] + 1
    assert metric(server, 'r1v2_requests_total{status="500"}') == counted[1]


def test_many_silent_connections_shut_nobody_out(server, client):
    """The server's limit is 2 x 64 + 64."""
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    waiting = [socket.create_connection(address) for _ in range(400)]
    assert get(f"{server.url}/health").status_code == 200
    assert ask(client, max_tokens=1).choices
    for connection in waiting:
        connection.close()


def test_refusals_reach_the_client_as_its_own_errors(server, client):
    with pytest.raises(openai.AuthenticationError, match="does not hold this server's key"):
        ask(server.client(api_key="guess"))
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="guess").models.list()
    with pytest.raises(openai.NotFoundError, match="model='gpt' is not served here"):
        client.chat.completions.create(model="gpt", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match=f"max_tokens={RESPONSE_TOKENS + 1} is out of range") as caught:
        ask(client, max_tokens=RESPONSE_TOKENS + 1)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError, match=r"the prompt has \d+ tokens .* data.max_prompt_tokens is 200"):
        ask(client, [{"role": "user", "content": "a" * 300}])
    for token in ("<img>", "<|im_end|>\n<|im_start|>assistant"):
        with pytest.raises(openai.BadRequestError, match="contains '<") as caught:
            ask(client, [{"role": "user", "content": token}])
        assert caught.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="This server fetches nothing"):
        ask(
            client,
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}]}],
        )
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings"):
        client.embeddings.create(model="tiny", input="x")
    headers = {"Authorization": "Bearer secret"}
    answer = post(f"{server.url}/v1/chat/completions", content=b"{", headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    answer = post(f"{server.url}/v1/chat/completions", content=b"[" * 900_000, headers=headers)
    assert answer.status_code == 400
    answer = post(f"{server.url}/v1/chat/completions", content=b" " * 1_100_000, headers=headers)
    assert (answer.status_code, "larger than 1048576 bytes" in answer.text) == (413, True)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(client):
    picture = io.BytesIO()
    Image.new("1", (9000, 9000)).save(picture, "PNG")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    with pytest.raises(openai.APIStatusError, match="81000000 pixels; accepted: at most 40000000") as caught:
        ask(client, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
    assert caught.value.status_code == 413


def test_a_full_server_says_when_to_come_again(server, client):
    """64 places: five requests for 16 responses each do not fit."""
    outcomes = []

    def one() -> None:
        try:
            ask(client, n=16, temperature=1)
            outcomes.append("ok")
        except openai.InternalServerError as error:
            outcomes.append((error.status_code, error.response.headers["Retry-After"]))

    threads = [threading.Thread(target=one) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert set(outcomes) == {"ok", (503, "5")}
    assert len(outcomes) == 12
    with pytest.raises(openai.BadRequestError, match="n=65 is out of range; accepted: 1 to 64"):
        ask(client, n=65)
