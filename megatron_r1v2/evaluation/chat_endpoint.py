"""A client of OpenAI-compatible chat servers: bounded concurrency, retries, time-outs, a clear end when one is down."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatron_r1v2.config.schema import EvaluationConfig
from megatron_r1v2.rewards.json_http import Refused, TryAgain, pause_seconds, post_json

# A response of 64K tokens is below a megabyte; more is no answer to what was asked.
_MAX_ANSWER_BYTES = 2**26
_REASONING_ENDS = "</think>"

Task = TypeVar("Task")


class EndpointFailed(RuntimeError):
    """An endpoint gives no answer, or refuses the question."""


@dataclass(frozen=True)
class Completion:
    """One answer of a chat endpoint.

    Example: text "3 + 5 = 8</think>\\\\boxed{8}", answer "\\\\boxed{8}", finish_reason "stop", tokens 17.
    """

    text: str
    """Where the server parts reasoning from answer, both, with `</think>` between them as the model writes it."""
    answer: str
    """What stands behind the reasoning: all of it where there is none, nothing where it has no end."""
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
    refused: set[str] = field(default_factory=set, compare=False)
    """Names in requests that the server has refused; later requests do without."""

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
        self, tasks: Sequence[Task], body: Callable[[Task], dict[str, Any]], *, about: Callable[[Task], str] = str
    ) -> Iterator[tuple[Task, Completion]]:
        """Ask about many things at once.

        Args:
            tasks: what to ask about.
            body: makes the request of a task, less the model's name; called in a thread of its own.
            about: names a task in an error.

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
                        pending[pool.submit(self._ask, task, body, about, stop)] = task
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

    def _ask(
        self,
        task: Task,
        body: Callable[[Task], dict[str, Any]],
        about: Callable[[Task], str],
        stop: threading.Event,
    ) -> Completion:
        return self.ask({"model": self.model, **body(task)}, stop, about=about(task))

    def ask(self, body: Mapping[str, Any], stop: threading.Event | None = None, *, about: str = "") -> Completion:
        """Ask once, patiently.

        Args:
            body: of the request.
            stop: set when the answer is no longer wanted; ends the retries.
            about: names the question in an error.

        Raises:
            EndpointFailed: no answer in all attempts, or the server refuses the request.
        """
        started, last = time.monotonic(), ""
        for attempt in range(self.attempts):
            if attempt:
                self.sleep(pause_seconds(attempt))
            if stop is not None and stop.is_set():
                raise EndpointFailed(f"{self.url} was not asked: another request had failed")
            try:
                return read_completion(self._post(body, about))
            except TryAgain as error:
                last = str(error)
        raise EndpointFailed(
            f"evaluation.{self.kind}_url={self.url!r} gave no answer in {self.attempts} attempts over "
            f"{time.monotonic() - started:.0f} s; the last one: {last}. Start the server again and then the same "
            "command: it goes on with what is missing. evaluation.attempts and evaluation.timeout_seconds give it more "
            "time"
        )

    def _post(self, body: Mapping[str, Any], about: str) -> Any:
        url = f"{self.url.rstrip('/')}/chat/completions"
        key = os.environ.get(self.key_variable, "") if self.key_variable else ""
        while True:
            sent = self._accepted(body)
            try:
                return post_json(
                    url,
                    sent,
                    {"Authorization": f"Bearer {key}"} if key else {},
                    seconds=self.timeout_seconds,
                    setting="evaluation.timeout_seconds",
                    max_bytes=_MAX_ANSWER_BYTES,
                )
            except Refused as error:
                if not self._learns(sent, str(error)):
                    raise EndpointFailed(self._refusal(url, about, error)) from error

    def _accepted(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return a request without what the server has refused."""
        sent = dict(body)
        if "max_tokens" in self.refused and "max_tokens" in sent:
            sent["max_completion_tokens"] = sent.pop("max_tokens")
        if "temperature" in self.refused:
            sent.pop("temperature", None)
        return sent

    def _learns(self, sent: Mapping[str, Any], told: str) -> bool:
        """Take note of a name that the server refuses, as OpenAI's reasoning models do; return whether one is new.

        The temperature of an evaluated model is part of its result: that one is never left out.
        """
        new = set()
        # Only a server that knows the newer name says it; another one would then have no limit at all.
        if "max_tokens" in sent and "max_completion_tokens" in told:
            new.add("max_tokens")
        if "temperature" in sent and "temperature" in told and self.kind == "judge":
            new.add("temperature")
        if not told.startswith("HTTP 400"):
            return False
        self.refused.update(new)
        return bool(new)

    def _refusal(self, url: str, about: str, error: Refused) -> str:
        limit = (
            "evaluation.judge_max_tokens"
            if self.kind == "judge"
            else ("generation.max_response_tokens, evaluation.temperature")
        )
        question = f" about {about!r}" if about else ""
        return (
            f"{url} refuses a request{question} with {error}; check evaluation.{self.kind}_url, "
            f"evaluation.{self.kind}_model, evaluation.{self.kind}_key_variable, {limit} and the question. "
            "What was answered before is kept"
        )


def read_completion(answer: Any) -> Completion:
    """Take the one choice out of an answer.

    Args:
        answer: JSON of /chat/completions.

    Raises:
        TryAgain: it is no such answer; what a proxy makes up must not count as a wrong response.
    """
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        content, reasoning = message.get("content"), message.get("reasoning_content") or message.get("reasoning")
        text = content or ""
        finish_reason = choice["finish_reason"]
        if not isinstance(text, str) or not isinstance(finish_reason, str):
            raise TypeError("content and finish_reason must be text")
    except (LookupError, TypeError, AttributeError) as error:
        raise TryAgain(f"not a chat completion ({error!r}): {json.dumps(answer)[:300]}") from error
    reply = text.rpartition(_REASONING_ENDS)[2]
    if isinstance(reasoning, str) and reasoning:
        # A server that parts them and tells no content at all has seen no end of the reasoning.
        text = reasoning if content is None else f"{reasoning}{_REASONING_ENDS}{text}"
    usage = answer.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Completion(text, reply, finish_reason, tokens if isinstance(tokens, int) else None)
