"""A reward model behind an HTTP endpoint, as vLLM or `r1v2 serve-reward-model` offer it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from enum import Enum

from megatron_r1v2.config.schema import RewardModelConfig
from megatron_r1v2.data.messages import openai_messages
from megatron_r1v2.parallel import objects
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.rewards.http_client import JsonClient, NoAnswer, Patience, Refused, ServerFailed, TryAgain
from megatron_r1v2.types import Prompt

# A larger number is a fault of the server: the squash of the rewards would hide it.
_LARGEST_SCORE = 1e30
_MAX_ANSWER_BYTES = 2**20

PATIENCE = Patience(timeout_seconds=120.0, attempts=5, concurrency=16, max_answer_bytes=_MAX_ANSWER_BYTES)
KEY_VARIABLE = "R1V2_REWARD_MODEL_API_KEY"


class ScoreEndpoint(str, Enum):
    """The endpoint that a served reward model gives its scores at."""

    pooling = "pooling"
    classify = "classify"


class ScoringFailed(ServerFailed):
    """The server gives no score for a response."""


class ServedRewardModel:
    """A `rewards.model.RewardModel` on a server, which the leader of a replica asks for all of its ranks.

    Args:
        context: decides who asks.
    """

    def __init__(
        self,
        settings: RewardModelConfig,
        context: ParallelContext,
        patience: Patience = PATIENCE,
    ) -> None:
        self.context = context
        self._url, self._endpoint = split_url(settings.url)
        self._client = JsonClient(patience, headers=authorization())

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Collective over the model-parallel group: score responses; see `RewardModel.score`.

        Args:
            prompts: of each response, with the encoded images.

        Raises:
            ScoringFailed: the server gives no score for one of them, on every rank of the replica.
        """
        outcome: tuple[list[float], str] | None = None
        if self.context.is_replica_leader:
            outcome = self._score_all(prompts, texts)
        if self.context.tensor_size * self.context.pipeline_size > 1:
            # The failure travels too: a rank that raised alone would let the others wait for it.
            outcome = objects.broadcast_from_first(outcome, self.context.groups.mp)
        assert outcome is not None
        scores, failure = outcome
        if failure:
            raise ScoringFailed(failure)
        return scores

    def _score_all(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> tuple[list[float], str]:
        """Return the scores, or the first failure."""
        scores: dict[int, float] = {}
        try:
            for index, score in self._client.ask_all(
                range(len(texts)), lambda index, stop: self._score(prompts[index], texts[index], stop)
            ):
                scores[index] = score
        except ScoringFailed as error:
            return [], f"{error}; {len(scores)} of {len(texts)} responses of this step had a score by then"
        return [scores[index] for index in range(len(texts))], ""

    def _score(self, prompt: Prompt, text: str, stop: threading.Event) -> float:
        body = score_request(prompt, text, self._endpoint)
        try:
            return self._client.ask(self._url, body, lambda answer: read_score(answer, self._endpoint), stop)
        except Refused as error:
            raise ScoringFailed(
                f"the reward model at {self._url} refuses the request with {error}; check reward_model.url "
                f"and the environment variable {KEY_VARIABLE}"
            ) from error
        except NoAnswer as error:
            raise ScoringFailed(
                f"the reward model at {self._url} gave no score for {prompt.key!r} in {error.attempts} attempts over "
                f"{error.seconds:.1f} s; the last one: {error}. Start the server again and then "
                "the run, which goes on from its newest checkpoint"
            ) from error


def split_url(url: str) -> tuple[str, ScoreEndpoint]:
    """Return the address that is asked, and what it understands: pooling where the address names neither."""
    for endpoint in ScoreEndpoint:
        if url.rstrip("/").endswith(f"/{endpoint.value}"):
            return url.rstrip("/"), endpoint
    return f"{url.rstrip('/')}/{ScoreEndpoint.pooling.value}", ScoreEndpoint.pooling


def authorization() -> dict[str, str]:
    """Return the header with the API key, where the environment has one."""
    key = os.environ.get(KEY_VARIABLE, "")
    return {"Authorization": f"Bearer {key}"} if key else {}


def score_request(prompt: Prompt, text: str, endpoint: ScoreEndpoint) -> dict[str, object]:
    """Return the body of a request: the conversation with the response as its last turn, and the reference answer.

    Args:
        prompt: with its encoded images.
    """
    messages = [*openai_messages(prompt.messages, prompt.images), {"role": "assistant", "content": text}]
    # Raw scores: vLLM would put a single logit through a sigmoid.
    body: dict[str, object] = {"messages": messages, "use_activation": False}
    # For a server of one's own that knows what to do with it; vLLM passes over fields that it does not know.
    if prompt.answer:
        body["answer"] = prompt.answer
    if endpoint is ScoreEndpoint.pooling:
        body["task"] = "classify"
    return body


def read_score(answer: object, endpoint: ScoreEndpoint) -> float:
    """Take the score out of an answer.

    pooling: {"data": [{"data": [score]}]}, or a list for each token, of which the last counts; classify:
    {"data": [{"probs": [score]}]}.

    Raises:
        TryAgain: anything else, or a number that is not finite.
    """
    name = "data" if endpoint is ScoreEndpoint.pooling else "probs"
    items = answer.get("data") if isinstance(answer, Mapping) else None
    item = items[0] if isinstance(items, list) and len(items) == 1 else None
    values = item.get(name) if isinstance(item, Mapping) else None
    if isinstance(values, list) and values and isinstance(values[-1], list):
        values = values[-1]
    if not isinstance(values, list) or len(values) != 1:
        raise TryAgain(f"the answer holds no single score: {json.dumps(answer)[:300]}")
    score = values[0]
    # A whole number of hundreds of digits is no float.
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= _LARGEST_SCORE:
        raise TryAgain(f"the score is {str(score)[:40]}, not a finite number")
    return float(score)
