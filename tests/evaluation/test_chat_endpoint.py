"""The client against a real server that is slow, broken, busy, gone, or lies."""

import json
import socket
import threading
import time

import pytest

from megatron_r1v2.evaluation.chat_endpoint import ChatEndpoint, EndpointFailed
from megatron_r1v2.rewards.http_client import Patience
from tests.evaluation.responder import completion, serving


def endpoint(url, *, timeout_seconds=20.0, attempts=3, concurrency=4, **changes):
    patience = Patience(timeout_seconds, attempts, concurrency, 2**20)
    settings = {"kind": "endpoint", "url": url, "model": "m", "key_variable": "", "sleep": lambda seconds: None}
    return ChatEndpoint(patience=patience, **{**settings, **changes})


BODY = {"messages": [{"role": "user", "content": "?"}]}


def test_answers_come_back_with_their_tasks_and_no_more_are_asked_at_once_than_allowed():
    with serving(lambda body: body["messages"][0]["content"] * 2) as (url, responder):
        responder.delay = 0.02
        tasks = [str(number) for number in range(20)]
        answers = endpoint(url).ask_all(tasks, lambda task: {"messages": [{"role": "user", "content": task}]})
        assert {task: answer.text for task, answer in answers} == {task: task * 2 for task in tasks}
    assert 2 <= responder.most_at_once <= 4
    assert {body["model"] for body in responder.bodies} == {"m"}


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    with serving(lambda body: "x") as (url, responder):
        endpoint(url, key_variable="MY_KEY").ask(BODY)
        endpoint(url).ask(BODY)
    assert [headers.get("Authorization") for headers in responder.headers] == ["Bearer secret", None]


@pytest.mark.parametrize(
    "trouble",
    [429, 500, 503, b"<html>", b"[" * 90_000, {"choices": []}, {"choices": [{"message": None}]}, []],
    ids=lambda trouble: str(trouble)[:20],
)
def test_what_may_pass_is_tried_again_with_longer_pauses(trouble):
    replies = [json.dumps(trouble).encode() if isinstance(trouble, list) else trouble] * 2 + ["fine"]
    pauses = []
    with serving(lambda body: replies.pop(0)) as (url, _):
        assert endpoint(url, sleep=pauses.append).ask({"messages": []}).text == "fine"
    assert pauses == [1.0, 2.0]


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_ends_at_once_and_names_the_settings(status):
    with serving(lambda body: status) as (url, responder):
        with pytest.raises(EndpointFailed, match=f"HTTP {status}.*scripted.*evaluation.endpoint_model"):
            endpoint(url).ask(BODY)
        assert len(responder.bodies) == 1


def reasoning_model(body):
    """Refuses as OpenAI's o-series does."""
    if "max_tokens" in body:
        return 400, "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
    if body.get("temperature", 1) != 1:
        return 400, "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) is."
    return f"limit {body['max_completion_tokens']}"


def test_what_a_reasoning_model_refuses_is_left_out_from_then_on():
    body = {**BODY, "temperature": 0.0, "max_tokens": 99}
    with serving(reasoning_model) as (url, responder):
        judge = endpoint(url, kind="judge", concurrency=1)
        assert [answer.text for _, answer in judge.ask_all("abc", lambda task: body)] == ["limit 99"] * 3
        assert [len(sent) for sent in responder.bodies] == [4, 4, 3, 3, 3]
        fresh = endpoint(url, kind="judge", concurrency=8)
        assert [answer.text for _, answer in fresh.ask_all("abcdefgh", lambda task: body)] == ["limit 99"] * 8


def test_the_temperature_of_an_evaluated_model_is_never_left_out():
    with serving(reasoning_model) as (url, _):
        with pytest.raises(EndpointFailed, match=r"temperature.*does not support 0.*evaluation.temperature"):
            endpoint(url).ask({**BODY, "temperature": 0.0, "max_tokens": 99})
        assert endpoint(url).ask({**BODY, "temperature": 1.0, "max_tokens": 99}).text == "limit 99"


def test_a_limit_is_not_taken_off_for_a_server_that_knows_no_other():
    with serving(lambda body: (400, "max_tokens is too large")) as (url, responder):
        with pytest.raises(EndpointFailed, match=r"too large.*the 8192 tokens of a verdict"):
            endpoint(url, kind="judge").ask({**BODY, "max_tokens": 99})
        assert len(responder.bodies) == 1


def test_a_refused_question_is_named():
    with serving(lambda body: 400) as (url, _), pytest.raises(EndpointFailed, match=r"a request about 'q-a' with HTTP"):
        list(endpoint(url).ask_all(["a"], lambda task: BODY, about=lambda task: f"q-{task}"))


def test_a_server_that_is_gone_is_told_clearly():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    with pytest.raises(EndpointFailed, match=r"evaluation.endpoint_url=.*no answer in 3 attempts.*the same command"):
        endpoint(url).ask(BODY)


def test_answers_before_a_failure_are_not_lost():
    def answer(body):
        return 400 if body["messages"][0]["content"] == "3" else "fine"

    with serving(answer) as (url, responder):
        answers = endpoint(url, concurrency=1).ask_all(
            ["0", "1", "2", "3", "4"], lambda task: {"messages": [{"role": "user", "content": task}]}
        )
        got = []
        with pytest.raises(EndpointFailed, match="HTTP 400"):
            got.extend(task for task, _ in answers)
    assert got == ["0", "1", "2"]
    assert len(responder.bodies) == 4


def test_a_server_that_drips_bytes_runs_into_the_limit():
    listener = socket.create_server(("127.0.0.1", 0))

    def drip():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                try:
                    for _ in range(100):
                        connection.sendall(b" ")
                        time.sleep(0.05)
                except OSError:
                    pass

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    started = time.monotonic()
    try:
        with pytest.raises(EndpointFailed, match="no complete answer in 0.3 s"):
            endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", timeout_seconds=0.3, attempts=2).ask(BODY)
    finally:
        listener.close()
    assert time.monotonic() - started < 4


def test_reasoning_that_a_server_parts_off_is_put_back():
    replies = [
        completion("\\boxed{8}", reasoning_content="3+5"),
        completion(None, reasoning_content="3+", finish_reason="length"),
        completion("", reasoning_content="3+5"),
        completion(None, reasoning_content="I give up"),
    ]
    with serving(lambda body: replies.pop(0)) as (url, _):
        assert endpoint(url).ask(BODY).text == "3+5</think>\\boxed{8}"
        assert endpoint(url).ask(BODY).text == "3+"
        assert endpoint(url).ask(BODY).text == "3+5</think>"
        assert endpoint(url).ask(BODY).text == "I give up"
