"""The one HTTP client of this package: JSON questions to servers that score, answer or judge.

Each question is bounded in time and size, and all of them in how many are under way. What may pass is tried again with
longer pauses; a server that is dead ends the work with the number of attempts and the last trouble.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, sleep_using_event, stop_after_attempt
from tenacity.wait import wait_exponential

_LONGEST_PAUSE_SECONDS = 30.0
# Shorter than servers keep idle connections (2 to 5 s): a request must not meet one that is being closed.
_KEEP_ALIVE_SECONDS = 1.0
# The request may be in order and the server not: busy, starting, or behind a proxy that lost it.
_WORTH_ANOTHER_TRY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_SHOWN_OF_ERROR = 500

Task = TypeVar("Task")
Answer = TypeVar("Answer")


class ServerFailed(RuntimeError):
    """A server gives no answer, or refuses the question; the message names the settings to check."""


class TryAgain(Exception):
    """An attempt failed in a way that may pass."""


class Refused(Exception):
    """The server says that the request is wrong."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class NoAnswer(Exception):
    """All attempts failed; the message is that of the last one."""

    def __init__(self, message: str, *, attempts: int, seconds: float) -> None:
        super().__init__(message)
        self.attempts = attempts
        self.seconds = seconds


class NotAsked(Exception):
    """Another question had failed before this one was asked."""


@dataclass(frozen=True)
class Patience:
    """The bounds on asking a server."""

    timeout_seconds: float
    """For a whole answer."""
    attempts: int
    """To get one answer."""
    concurrency: int
    """Requests under way at once."""
    max_answer_bytes: int
    first_pause_seconds: float = 1.0
    """Before the second attempt; doubles with each, up to half a minute."""


class JsonClient:
    """A client that posts JSON and reads JSON; threads may share it.

    Args:
        sleep: waits between attempts; None: until the pause is over or another question has failed.
    """

    def __init__(
        self,
        patience: Patience,
        *,
        headers: Mapping[str, str] | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self._patience = patience
        self._sleep = sleep
        self._http = httpx.Client(
            # Compressed answers could grow beyond the limit before they are counted.
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity", **(headers or {})},
            timeout=patience.timeout_seconds,
            limits=httpx.Limits(max_connections=patience.concurrency, keepalive_expiry=_KEEP_ALIVE_SECONDS),
        )

    def post(self, url: str, body: Mapping[str, object]) -> object:
        """Send an object once and return the JSON of the answer.

        Raises:
            TryAgain: no answer, no complete one, one that is not JSON or too long, or the server is in trouble.
            Refused: the server says that the request is wrong.
        """
        patience = self._patience
        deadline = time.monotonic() + patience.timeout_seconds
        too_late = TryAgain(f"no complete answer in {patience.timeout_seconds:g} s")
        answer = bytearray()
        try:
            # Not httpx's own JSON: it fails on half of a surrogate pair, which a text may hold.
            with self._http.stream("POST", url, content=json.dumps(body).encode()) as response:
                if not response.is_success:
                    raise _failure(response)
                for part in response.iter_bytes():
                    answer += part
                    if len(answer) > patience.max_answer_bytes:
                        raise TryAgain(f"the answer is longer than {patience.max_answer_bytes} bytes")
                    # httpx limits each read: a server that drips bytes would never reach its limit.
                    if time.monotonic() > deadline:
                        raise too_late
            return json.loads(bytes(answer))
        except httpx.TimeoutException as error:
            raise too_late from error
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError) as error:
            # Bad JSON and bad UTF-8 are ValueErrors, endless brackets a RecursionError.
            raise TryAgain(f"{type(error).__name__}: {error}") from error

    def ask(
        self,
        url: str,
        body: Mapping[str, object],
        read: Callable[[object], Answer],
        stop: threading.Event | None = None,
    ) -> Answer:
        """Send an object until there is an answer.

        Args:
            read: takes the result out of the answer's JSON; raises TryAgain where there is none.
            stop: set when the answer is no longer wanted.

        Raises:
            NoAnswer: all attempts failed.
            Refused: the server says that the request is wrong.
            NotAsked: `stop` was set.
        """
        stop = stop or threading.Event()

        def attempt() -> Answer:
            if stop.is_set():
                raise NotAsked
            return read(self.post(url, body))

        retrying = Retrying(
            retry=retry_if_exception_type(TryAgain),
            stop=stop_after_attempt(self._patience.attempts),
            wait=wait_exponential(self._patience.first_pause_seconds, max=_LONGEST_PAUSE_SECONDS),
            sleep=self._sleep or sleep_using_event(stop),
            retry_error_callback=_give_up,
        )
        return retrying(attempt)

    def ask_all(
        self, tasks: Iterable[Task], ask: Callable[[Task, threading.Event], Answer]
    ) -> Iterator[tuple[Task, Answer]]:
        """Ask about many things at once.

        Args:
            ask: calls `ask` of this client with the event, and turns its errors into ServerFailed.

        Yields:
            (task, answer) as they come in. What came in before a failure is yielded before it is raised.

        Raises:
            ServerFailed: one of them got no answer; nothing more is asked.
        """
        stop = threading.Event()

        def ask_or_stop(task: Task) -> Answer:
            try:
                return ask(task, stop)
            except ServerFailed:
                # Here, in the thread that failed: it would take up the next task before the caller hears of it.
                stop.set()
                raise

        failure: ServerFailed | None = None
        with ThreadPoolExecutor(max_workers=self._patience.concurrency) as pool:
            pending = {pool.submit(ask_or_stop, task): task for task in tasks}
            try:
                for future in as_completed(pending):
                    try:
                        answer = future.result()
                    except NotAsked:
                        continue
                    except ServerFailed as error:
                        failure = failure or error
                        continue
                    yield pending[future], answer
            finally:
                stop.set()
        if failure is not None:
            raise failure


def _failure(response: httpx.Response) -> TryAgain | Refused:
    message = f"HTTP {response.status_code}: {_beginning(response)}"
    return TryAgain(message) if response.status_code in _WORTH_ANOTHER_TRY else Refused(message, response.status_code)


def _beginning(response: httpx.Response) -> str:
    """Return the beginning of a server's words about an error, if they arrive."""
    words = b""
    try:
        for part in response.iter_bytes():
            words += part
            if len(words) >= _SHOWN_OF_ERROR:
                break
    except httpx.HTTPError:
        return words.decode(errors="replace") or "(no text)"
    return words[:_SHOWN_OF_ERROR].decode(errors="replace")


def _give_up(state: RetryCallState) -> NoReturn:
    assert state.outcome is not None
    last = state.outcome.exception()
    seconds = state.seconds_since_start
    raise NoAnswer(str(last), attempts=state.attempt_number, seconds=seconds or 0.0) from last
