"""A scoring server that misbehaves on demand, as a process of its own: `python scoring_server.py PORT_FILE`.

The first part of the path says how: /ok, /slow (half a second), /hangs, /drips, /garbage, /nan, /two, /empty, /huge
(no scores), /refuses (401), /busy (503), /wakes (503 for the first three requests). The score is the number of words of
the response.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WRONG = {
    "garbage": b"<html>Bad gateway</html>",
    "nan": b'{"data": [{"data": [NaN], "probs": [NaN]}]}',
    "two": b'{"data": [{"data": [1.0, 2.0], "probs": [1.0, 2.0]}]}',
    "empty": b'{"data": []}',
    "huge": b'{"data": "' + b"x" * 2**21 + b'"}',
}
STATUS = {"refuses": 401, "busy": 503}


class Handler(BaseHTTPRequestHandler):
    lock = threading.Lock()
    asked = 0
    under_way = 0
    most_under_way = 0
    last: dict | None = None

    def do_GET(self) -> None:
        self._answer(200, json.dumps({"asked": self.asked, "most": self.most_under_way, "last": self.last}).encode())

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with Handler.lock:
            Handler.asked += 1
            Handler.last = {"body": content, "path": self.path, "key": self.headers.get("Authorization", "")}
            number = Handler.asked
        self._behave(self.path.split("/")[1], content, number)

    def _behave(self, mode: str, content: dict, number: int) -> None:
        score = float(len(content["messages"][-1]["content"].split()))
        good = json.dumps({"data": [{"index": 0, "data": [score], "probs": [score]}]}).encode()
        if mode in STATUS or (mode == "wakes" and number <= 3):
            self._answer(STATUS.get(mode, 503), b'{"error": {"message": "told why"}}')
        elif mode == "drips":
            self._answer(200, good, pause=0.2)
        else:
            self._work({"slow": 0.5, "hangs": 60}.get(mode, 0.0))
            self._answer(200, WRONG.get(mode, good))

    def _work(self, seconds: float) -> None:
        """Count as under way until the answer: a client that has it may ask again before this handler ends."""
        with Handler.lock:
            Handler.under_way += 1
            Handler.most_under_way = max(Handler.most_under_way, Handler.under_way)
        time.sleep(seconds)
        with Handler.lock:
            Handler.under_way -= 1

    def _answer(self, status: int, body: bytes, pause: float = 0.0) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for start in range(0, len(body), 1 if pause else len(body)):
            self.wfile.write(body[start : start + (1 if pause else len(body))])
            time.sleep(pause)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with open(sys.argv[1] + ".partial", "w") as file:
        file.write(str(server.server_port))
    os.rename(sys.argv[1] + ".partial", sys.argv[1])
    server.serve_forever()
