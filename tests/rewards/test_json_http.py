"""What a server does in the middle of an answer; the rest is tested with the two clients that ask."""

import socket
import threading

import pytest

from megatron_r1v2.rewards.json_http import Refused, TryAgain, pause_seconds, post_json


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
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
            return post_json(url, {"a": 1}, {}, seconds=5, setting="x.seconds", max_bytes=1000)
        finally:
            thread.join()


def test_an_answer_that_breaks_off_is_tried_again():
    with pytest.raises(TryAgain, match="IncompleteRead|JSON"):
        ask(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
    with pytest.raises(TryAgain, match="longer than 1000 bytes"):
        ask(b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b" " * 2000)


def test_a_refusal_whose_words_break_off_is_still_a_refusal():
    with pytest.raises(Refused, match="HTTP 400: "):
        ask(b"HTTP/1.1 400 Bad Request\r\nTransfer-Encoding: chunked\r\n\r\n20\r\nno")
    with pytest.raises(TryAgain, match="HTTP 503: later"):
        ask(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 5\r\n\r\nlater")


def test_pauses_double_up_to_half_a_minute():
    assert [pause_seconds(failures) for failures in (1, 2, 5, 6, 90)] == [1, 2, 16, 30, 30]
    assert pause_seconds(3, first=0.1) == pytest.approx(0.4)
