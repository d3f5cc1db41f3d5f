"""A real HTTP server that speaks the OpenAI chat protocol and answers by a script."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Responder:
    """A server with a script, and the requests that it got.

    Args:
        answer: body -> text, dict (a whole answer), int (an HTTP status), (status, what is told), or bytes (sent as
            they are).
    """

    def __init__(self, answer):
        self.answer = answer
        self.bodies, self.headers = [], []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.delay = 0.0

    @contextmanager
    def counted(self, body, headers):
        with self.lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            yield
        finally:
            with self.lock:
                self.at_once -= 1


@contextmanager
def serving(answer, *, port=0):
    """Serve on loopback; yields (base URL, responder)."""
    responder = Responder(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with responder.counted(body, dict(self.headers)):
                time.sleep(responder.delay)
                reply = responder.answer(body) if self.path.endswith("/chat/completions") else 404
            self.send(reply)

        def send(self, reply):
            status, content = 200, reply
            if isinstance(reply, int):
                status, content = reply, b'{"error": {"message": "scripted"}}'
            if isinstance(reply, tuple):
                status, content = reply[0], {"error": {"message": reply[1]}}
            if isinstance(reply, str):
                content = completion(reply)
            if isinstance(content, dict):
                content = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", responder
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(text, *, finish_reason="stop", tokens=7, **message):
    """Return a whole answer."""
    return {
        "id": "1",
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, **message},
                "finish_reason": finish_reason,
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens},
    }
