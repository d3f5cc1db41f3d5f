"""One JSON question to a server, and its answer within a time and a size: for servers that score or chat."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

_LONGEST_PAUSE_SECONDS = 30.0
# The request may be in order and the server not: busy, starting, or behind a proxy that lost it.
_WORTH_ANOTHER_TRY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


class TryAgain(Exception):
    """An attempt failed in a way that may pass."""


class Refused(Exception):
    """The server says that the request is wrong."""


def pause_seconds(failures: int, first: float = 1.0) -> float:
    """Return how long to wait before another attempt.

    Args:
        failures: so far, at least one.
        first: seconds after one failure; doubles with each.
    """
    return min(first * 2.0 ** (failures - 1), _LONGEST_PAUSE_SECONDS)


def post_json(
    url: str, body: Mapping[str, Any], headers: Mapping[str, str], *, seconds: float, setting: str, max_bytes: int
) -> Any:
    """Send a JSON object and return the JSON of the answer.

    Args:
        url: where to.
        body: the object.
        headers: beside the type of the content.
        seconds: for the whole answer.
        setting: that they come from, for the message.
        max_bytes: of the answer.

    Raises:
        TryAgain: no answer, no complete one, one that is no JSON or too long, or the server is in trouble.
        Refused: the server says that the request is wrong.
    """
    deadline = time.monotonic() + seconds
    all_headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(url, json.dumps(body).encode(), all_headers, method="POST")
    answer = bytearray()
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            # The socket's limit is for each read: a server that drips bytes would never reach it.
            while part := response.read1(2**16):
                answer += part
                if len(answer) > max_bytes:
                    raise TryAgain(f"the answer is longer than {max_bytes} bytes")
                if time.monotonic() > deadline:
                    raise TryAgain(f"no complete answer in {setting}={seconds:g}")
        return json.loads(bytes(answer))
    except urllib.error.HTTPError as error:
        told = f"HTTP {error.code}: {_told(error)}"
        raise (TryAgain if error.code in _WORTH_ANOTHER_TRY else Refused)(told) from error
    except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
        # URLError and time-outs are OSErrors; bad JSON and bad UTF-8 are ValueErrors, endless brackets recursion.
        raise TryAgain(f"{type(error).__name__}: {error}") from error


def _told(error: urllib.error.HTTPError) -> str:
    """Return the beginning of what a server says of an error, if it says it."""
    try:
        return error.read(500).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return "(no text)"
