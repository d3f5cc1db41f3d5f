"""A client of OpenAI-compatible chat servers: bounded concurrency, retries, time-outs, a clear end when one is down."""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_r1v2.config.schema import EvaluationConfig

# A response of 64K tokens is below a megabyte; more is no answer to what was asked.
_MAX_ANSWER_BYTES = 2**26
_LONGEST_PAUSE_SECONDS = 30.0
# The request may be in order and the server not: busy, starting, or behind a proxy that lost it.
_WORTH_ANOTHER_TRY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})

Task = TypeVar("Task")


class EndpointFailed(RuntimeError):
    """An endpoint gives no answer, or refuses the question."""


class _TryAgain(Exception):
    """An attempt failed in a way that may pass."""


@dataclass(frozen=True)
class Completion:
    """One answer of a chat endpoint.

    Example: text "3 + 5 = 8</think>\\\\boxed{8}", finish_reason "stop", tokens 17.
    """

    text: str
    """Where the server parts reasoning from answer, both, with `</think>` between them as the model writes it."""
    finish_reason: str
    """"stop", "length", or what else the server says."""
    tokens: int | None
    """None: the server does not say."""


@dataclass(frozen=True)
class ChatEndpoint:
    """Where to ask, and how patiently."""

    kind: str
    """"endpoint" or "judge": the settings are `evaluation.KIND_url` and so on."""
    url: str
    model: str
    key_variable: str
    timeout_seconds: float
    attempts: int
    concurrency: int
    sleep: Callable[[float], None] = time.sleep

    @classmethod
    def from_settings(cls, settings: EvaluationConfig, kind: str) -> ChatEndpoint:
        """Take the endpoint or the judge from the settings.

        Args:
            settings: the `evaluation` section.
            kind: "endpoint" or "judge".
        """
        return cls(
            kind=kind,
            url=getattr(settings, f"{kind}_url"),
            model=getattr(settings, f"{kind}_model"),
            key_variable=getattr(settings, f"{kind}_key_variable"),
            timeout_seconds=settings.timeout_seconds,
            attempts=settings.attempts,
            concurrency=settings.concurrency,
        )

    def ask_all(
        self, tasks: Sequence[Task], body: Callable[[Task], dict[str, Any]]
    ) -> Iterator[tuple[Task, Completion]]:
        """Ask about many things at once.

        Args:
            tasks: what to ask about.
            body: makes the request of a task, less the model's name; called in a thread of its own.

        Yields:
            (task, answer) as they come in. What has come in before a failure is yielded before it is raised.

        Raises:
            EndpointFailed: one of them got no answer; nothing more is asked.
        """
        stop = threading.Event()
        waiting = iter(tasks)
        pending: dict[Future[Completion], Task] = {}
        failure: EndpointFailed | None = None
        with ThreadPoolExecutor(max_workers=self.concurrency) as pool:
            try:
                while True:
                    for task in waiting if failure is None else ():
                        pending[pool.submit(self._ask, task, body, stop)] = task
                        if len(pending) == self.concurrency:
                            break
                    if not pending:
                        break
                    done, _ = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        task = pending.pop(future)
                        error = future.exception()
                        if isinstance(error, EndpointFailed):
                            # The first failure is told; requests under way may still be answered.
                            failure = failure or error
                            stop.set()
                        else:
                            yield task, future.result()
            finally:
                stop.set()
        if failure is not None:
            raise failure

    def _ask(self, task: Task, body: Callable[[Task], dict[str, Any]], stop: threading.Event) -> Completion:
        return self.ask({"model": self.model, **body(task)}, stop)

    def ask(self, body: Mapping[str, Any], stop: threading.Event | None = None) -> Completion:
        """Ask once, patiently.

        Args:
            body: of the request.
            stop: set when the answer is no longer wanted; ends the retries.

        Raises:
            EndpointFailed: no answer in all attempts, or the server refuses the request.
        """
        started, last = time.monotonic(), ""
        for attempt in range(self.attempts):
            if attempt:
                self.sleep(min(2.0 ** (attempt - 1), _LONGEST_PAUSE_SECONDS))
            if stop is not None and stop.is_set():
                raise EndpointFailed(f"{self.url} was not asked: another request had failed")
            try:
                return read_completion(self._post(json.dumps(body).encode()))
            except _TryAgain as error:
                last = str(error)
        raise EndpointFailed(
            f"evaluation.{self.kind}_url={self.url!r} gave no answer in {self.attempts} attempts over "
            f"{time.monotonic() - started:.0f} s; the last one: {last}. Start the server again and then the same "
            "command: it goes on with what is missing. evaluation.attempts and evaluation.timeout_seconds give it more "
            "time"
        )

    def _post(self, body: bytes) -> Any:
        """Return the JSON of one answer, all of it within the time limit."""
        headers = {"Content-Type": "application/json"}
        if self.key_variable:
            headers["Authorization"] = f"Bearer {os.environ.get(self.key_variable, '')}"
        url = f"{self.url.rstrip('/')}/chat/completions"
        deadline = time.monotonic() + self.timeout_seconds
        answer = bytearray()
        try:
            request = urllib.request.Request(url, body, headers, method="POST")
            with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
                # The socket's limit is for each read: a server that drips bytes would never reach it.
                while part := response.read1(2**16):
                    answer += part
                    if len(answer) > _MAX_ANSWER_BYTES:
                        raise _TryAgain(f"the answer is longer than {_MAX_ANSWER_BYTES} bytes")
                    if time.monotonic() > deadline:
                        raise _TryAgain(f"no complete answer in evaluation.timeout_seconds={self.timeout_seconds:g}")
            return json.loads(bytes(answer))
        except urllib.error.HTTPError as error:
            told = error.read(500).decode(errors="replace")
            if error.code in _WORTH_ANOTHER_TRY:
                raise _TryAgain(f"HTTP {error.code}: {told}") from error
            raise EndpointFailed(
                f"{url} refuses a request with HTTP {error.code}: {told}; check evaluation.{self.kind}_url, "
                f"evaluation.{self.kind}_model, evaluation.{self.kind}_key_variable and "
                "generation.max_response_tokens. What was answered before is kept"
            ) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            # URLError and time-outs are OSErrors; bad JSON and bad UTF-8 are ValueErrors.
            raise _TryAgain(f"{type(error).__name__}: {error}") from error


def read_completion(answer: Any) -> Completion:
    """Take the one choice out of an answer.

    Args:
        answer: JSON of /chat/completions.

    Raises:
        _TryAgain: it is no such answer; what a proxy makes up must not count as a wrong response.
    """
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        text, reasoning = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning")
        finish_reason = choice["finish_reason"]
        if not isinstance(text, str) or not isinstance(finish_reason, str):
            raise TypeError("content and finish_reason must be text")
    except (LookupError, TypeError, AttributeError) as error:
        raise _TryAgain(f"not a chat completion ({error!r}): {json.dumps(answer)[:300]}") from error
    if isinstance(reasoning, str) and reasoning:
        text = f"{reasoning}</think>{text}" if text or finish_reason == "stop" else reasoning
    usage = answer.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Completion(text, finish_reason, tokens if isinstance(tokens, int) else None)
