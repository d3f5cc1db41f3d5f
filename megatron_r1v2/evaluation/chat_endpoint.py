"""A client of OpenAI-compatible chat servers, for the model that is evaluated and for the judge."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from megatron_r1v2.config.schema import EvaluationConfig
from megatron_r1v2.rewards.http_client import JsonClient, NoAnswer, Patience, Refused, ServerFailed, TryAgain

# A response of 64K tokens is below a megabyte; a longer answer is a fault of the server.
_MAX_ANSWER_BYTES = 2**26
_REASONING_ENDS = "</think>"

Kind = Literal["endpoint", "judge"]
Task = TypeVar("Task")

# Six tries, with pauses of up to half a minute, survive a server that starts again; long reasoning takes an hour.
PATIENCE = Patience(timeout_seconds=3600.0, attempts=6, concurrency=32, max_answer_bytes=_MAX_ANSWER_BYTES)
JUDGE_MAX_TOKENS = 8192
"""The longest answer of a judge, its reasoning included; one that is cut off gives no verdict."""
KEY_VARIABLES: Mapping[Kind, str] = {"endpoint": "R1V2_ENDPOINT_API_KEY", "judge": "R1V2_JUDGE_API_KEY"}
"""The environment variables of the API keys."""


class EndpointFailed(ServerFailed):
    """An endpoint gives no answer, or refuses the question."""


@dataclass(frozen=True)
class Completion:
    """One answer of a chat endpoint.

    Example: text "3 + 5 = 8</think>\\\\boxed{8}", answer "\\\\boxed{8}", finish_reason "stop", tokens 17.
    """

    text: str
    """Reasoning and answer with `</think>` between them as the model writes it, also where the server splits them."""
    answer: str
    """The text behind the reasoning: all of it without reasoning, nothing where the reasoning has no end."""
    finish_reason: str
    """"stop", "length", or another word of the server."""
    tokens: int | None
    """None: the server does not say."""


class _Message(BaseModel):
    content: str | None = None
    reasoning_content: object = None
    reasoning: object = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str


class _Answer(BaseModel):
    """The fields that are read of an answer of /chat/completions; servers add others."""

    choices: list[_Choice] = Field(min_length=1)
    usage: object = None


class ChatEndpoint:
    """The address of a chat server, and the patience with it.

    Args:
        kind: the settings are `evaluation.KIND_url` and so on.
        url: up to /v1.
        key_variable: environment variable with the API key; empty: no key.
        sleep: waits between attempts; None: until another request fails.
    """

    def __init__(
        self,
        *,
        kind: Kind,
        url: str,
        model: str,
        key_variable: str,
        patience: Patience,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self.kind = kind
        self.url = url
        self.model = model
        self._refused: set[str] = set()
        """Fields of requests that the server has refused; later requests do without."""
        key = os.environ.get(key_variable, "") if key_variable else ""
        self._client = JsonClient(patience, headers={"Authorization": f"Bearer {key}"} if key else {}, sleep=sleep)

    @classmethod
    def from_settings(cls, settings: EvaluationConfig, kind: Kind) -> ChatEndpoint:
        """Take the endpoint or the judge from the `evaluation` section."""
        is_judge = kind == "judge"
        return cls(
            kind=kind,
            url=settings.judge_url if is_judge else settings.endpoint_url,
            model=settings.judge_model if is_judge else settings.endpoint_model,
            key_variable=KEY_VARIABLES[kind],
            patience=PATIENCE,
        )

    def ask_all(
        self,
        tasks: Sequence[Task],
        body: Callable[[Task], Mapping[str, object]],
        *,
        about: Callable[[Task], str] = str,
    ) -> Iterator[tuple[Task, Completion]]:
        """Ask about many things at once.

        Args:
            body: makes the request of a task, less the model's name; called in a thread of its own.
            about: names a task in an error.

        Yields:
            (task, answer) as they come in. What came in before a failure is yielded before it is raised.

        Raises:
            EndpointFailed: one of them got no answer; nothing more is asked.
        """
        return self._client.ask_all(tasks, lambda task, stop: self.ask(body(task), stop, about=about(task)))

    def ask(self, body: Mapping[str, object], stop: threading.Event | None = None, *, about: str = "") -> Completion:
        """Ask until there is an answer.

        Raises:
            EndpointFailed: no answer in all attempts, or the server refuses the request.
            NotAsked: `stop` was set.
        """
        url = f"{self.url.rstrip('/')}/chat/completions"
        while True:
            sent = self._without_refused({"model": self.model, **body})
            try:
                return self._client.ask(url, sent, read_completion, stop)
            except Refused as error:
                if not self._learn(sent, error):
                    raise EndpointFailed(self._refusal(url, about, error)) from error
            except NoAnswer as error:
                raise EndpointFailed(
                    f"evaluation.{self.kind}_url={self.url!r} gave no answer in {error.attempts} attempts over "
                    f"{error.seconds:.0f} s; the last one: {error}. Start the server again and then the same "
                    "command: it goes on with what is missing"
                ) from error

    def _without_refused(self, body: Mapping[str, object]) -> dict[str, object]:
        sent = dict(body)
        if "max_tokens" in self._refused and "max_tokens" in sent:
            sent["max_completion_tokens"] = sent.pop("max_tokens")
        if "temperature" in self._refused:
            sent.pop("temperature", None)
        return sent

    def _learn(self, sent: Mapping[str, object], error: Refused) -> bool:
        """Note a field that the server refuses, as OpenAI's reasoning models do; return whether one is new."""
        if error.status != 400:
            return False
        message = str(error)
        new = set()
        # Only a server that knows the newer name says it; another one would then have no limit at all.
        if "max_tokens" in sent and "max_completion_tokens" in message:
            new.add("max_tokens")
        # The temperature of an evaluated model is part of its result: that one is never left out.
        if "temperature" in sent and "temperature" in message and self.kind == "judge":
            new.add("temperature")
        self._refused.update(new)
        return bool(new)

    def _refusal(self, url: str, about: str, error: Refused) -> str:
        limit = (
            f"the {JUDGE_MAX_TOKENS} tokens of a verdict"
            if self.kind == "judge"
            else ("generation.max_response_tokens, evaluation.temperature")
        )
        question = f" about {about!r}" if about else ""
        return (
            f"{url} refuses a request{question} with {error}; check evaluation.{self.kind}_url, "
            f"evaluation.{self.kind}_model, the environment variable {KEY_VARIABLES[self.kind]}, {limit} and the "
            "question. "
            "What was answered before is kept"
        )


def read_completion(answer: object) -> Completion:
    """Take the one choice out of an answer of /chat/completions.

    Raises:
        TryAgain: it is not such an answer; what a proxy makes up must not count as a wrong response.
    """
    try:
        read = _Answer.model_validate(answer)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise TryAgain(f"not a chat completion ({place}: {first['msg']}): {json.dumps(answer)[:300]}") from error
    choice = read.choices[0]
    content, reasoning = choice.message.content, choice.message.reasoning_content or choice.message.reasoning
    text = content or ""
    reply = text.rpartition(_REASONING_ENDS)[2]
    if isinstance(reasoning, str) and reasoning:
        # A server that separates them and sends no content has seen no end of the reasoning.
        text = reasoning if content is None else f"{reasoning}{_REASONING_ENDS}{text}"
    tokens = read.usage.get("completion_tokens") if isinstance(read.usage, dict) else None
    return Completion(text, reply, choice.finish_reason, tokens if isinstance(tokens, int) else None)
