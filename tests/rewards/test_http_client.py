"""Servers that fail in the middle of an answer, and the client's response."""

import socket
import threading
import time

import pytest

from megatron_r1v2.rewards.http_client import JsonClient, NoAnswer, NotAsked, Patience, Refused, ServerFailed, TryAgain
from tests.evaluation.responder import serving


def client(*, sleep=lambda seconds: None, **changes):
    settings = {
        "timeout_seconds": 5.0, "attempts": 3, "concurrency": 4, "max_answer_bytes": 1000,
    }  # fmt: skip
    return JsonClient(Patience(**{**settings, **changes}), sleep=sleep)


def ask(answer):
    """Ask a server that sends these bytes and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reply():
            connection, _ = listener.accept()
            with connection:
                received = b""
                while not received.endswith(b'{"a": 1}'):
                    received += connection.recv(2**16)
                connection.sendall(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        try:
            return client().post(f"http://127.0.0.1:{listener.getsockname()[1]}/", {"a": 1})
        finally:
            thread.join()


@pytest.fixture
def nobody():
    """Return an address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"http://127.0.0.1:{port}/"


def test_an_answer_that_breaks_off_is_tried_again():
    with pytest.raises(TryAgain, match="RemoteProtocolError: peer closed connection"):
        ask(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
    with pytest.raises(TryAgain, match="longer than 1000 bytes"):
        ask(b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b" " * 2000)


def test_a_refusal_whose_words_break_off_is_still_a_refusal():
    with pytest.raises(Refused, match="HTTP 400: no") as caught:
        ask(b"HTTP/1.1 400 Bad Request\r\nTransfer-Encoding: chunked\r\n\r\n20\r\nno")
    assert caught.value.status == 400
    with pytest.raises(Refused, match=r"HTTP 400: \(no text\)"):
        ask(b"HTTP/1.1 400 Bad Request\r\nTransfer-Encoding: chunked\r\n\r\n20\r\n")
    with pytest.raises(TryAgain, match="HTTP 503: later"):
        ask(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 5\r\n\r\nlater")
    with pytest.raises(Refused, match="^HTTP 404: x{500}$"):
        ask(b"HTTP/1.1 404 Not Found\r\nContent-Length: 900\r\n\r\n" + b"x" * 900)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n<html>", "JSONDecodeError"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 999, "RecursionError|JSONDecodeError"),
        (b'HTTP/1.1 200 OK\r\n\r\n"\xff"', "UnicodeDecodeError"),
        (b"nonsense\r\n\r\n", "RemoteProtocolError"),
        (b"", "RemoteProtocolError"),
    ],
    ids=["HTML", "brackets", "no Unicode", "no HTTP", "nothing"],
)
def test_what_is_no_json_answer_may_pass(answer, message):
    with pytest.raises(TryAgain, match=message):
        ask(answer)


def test_answers_and_requests_are_json_as_written():
    assert ask(b'HTTP/1.1 201 Created\r\n\r\n{"b": [2]}') == {"b": [2]}
    with serving(lambda body: {"echo": body}) as (url, _):
        # Half of a surrogate pair, which UTF-8 cannot hold.
        body = {"text": "\ud800 \u00e9"}
        assert client().post(f"{url}/chat/completions", body) == {"echo": body}


def test_pauses_double_up_to_half_a_minute(nobody):
    def pauses(attempts, **settings):
        found = []
        with pytest.raises(NoAnswer, match="refused") as caught:
            client(attempts=attempts, sleep=found.append, **settings).ask(nobody, {}, str)
        assert caught.value.attempts == attempts
        assert 0 < caught.value.seconds < 60
        return found

    found = pauses(91)
    assert len(found) == 90
    assert [found[failures - 1] for failures in (1, 2, 5, 6, 90)] == [1, 2, 16, 30, 30]
    assert pauses(4, first_pause_seconds=0.1)[2] == pytest.approx(0.4)


def test_an_answer_that_cannot_be_read_is_asked_for_again():
    def read(answer):
        if answer["n"] < 2:
            raise TryAgain("too small")
        return answer["n"]

    numbers = iter(range(9))
    with serving(lambda body: {"n": next(numbers)}) as (url, _):
        url = f"{url}/chat/completions"
        assert client().ask(url, {}, read) == 2
        with pytest.raises(NoAnswer, match="too small"):
            client(attempts=2).ask(url, {}, lambda answer: read({"n": 0}))


def test_an_answer_that_hangs_ends_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(TryAgain, match=r"no complete answer in 0.2 s"):
            client(timeout_seconds=0.2).post(f"http://127.0.0.1:{silent.getsockname()[1]}/", {})
        assert time.monotonic() - started < 3


def test_a_pause_ends_when_the_answer_is_no_longer_wanted(nobody):
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    started = time.monotonic()
    with pytest.raises(NotAsked):
        client(sleep=None, first_pause_seconds=30.0).ask(nobody, {}, str, stop)
    assert time.monotonic() - started < 10


def failing(url, one):
    """Return a client's `ask_all` argument: what cannot be read is a ServerFailed."""

    def ask(task, stop):
        try:
            return one.ask(url, {"task": task}, lambda answer: answer["n"], stop)
        except (Refused, NoAnswer) as error:
            raise ServerFailed(f"{task}: {error}") from error

    return ask


def test_many_are_asked_at_once_but_no_more_than_allowed():
    with serving(lambda body: {"n": body["task"] * 2}) as (url, responder):
        responder.delay = 0.02
        one = client(concurrency=4)
        found = dict(one.ask_all(range(20), failing(f"{url}/chat/completions", one)))
    assert found == {task: 2 * task for task in range(20)}
    assert 2 <= responder.most_at_once <= 4


def test_the_first_failure_ends_what_was_not_asked_yet():
    with serving(lambda body: 400 if body["task"] == 3 else {"n": 1}) as (url, responder):
        one, got = client(concurrency=1), []
        with pytest.raises(ServerFailed, match="3: HTTP 400"):
            got.extend(task for task, _ in one.ask_all(range(100), failing(f"{url}/chat/completions", one)))
    assert got == [0, 1, 2]
    assert len(responder.bodies) == 4


def test_who_stops_listening_asks_no_more():
    with serving(lambda body: {"n": 1}) as (url, responder):
        responder.delay = 0.02
        one = client(concurrency=2)
        answers = one.ask_all(range(200), failing(f"{url}/chat/completions", one))
        next(answers)
        answers.close()
        asked = len(responder.bodies)
    assert asked < 20
