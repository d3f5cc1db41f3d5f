"""The endpoints of a reward model: /pooling and /classify as vLLM has them for chat messages, and /health."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from megatron_r1v2.serve.requests import BadRequest, BodyReader, Limits, Turn, json_endpoint, read_messages

MOST_REQUESTS = 256
"""That wait for their scores; beyond it a client is told 503, and tries again."""


class ConversationScorer(Protocol):
    """A model that scores the last turn of a conversation."""

    @property
    def name(self) -> str:
        """Return what the model is called in answers."""
        ...

    def score(self, turns: Sequence[Turn]) -> tuple[float, int]:
        """Return the raw score and the tokens that were read; raise BadRequest for a conversation it cannot score."""
        ...


def reward_app(scorer: ConversationScorer, *, limits: Limits | None = None, api_key: str = "") -> Starlette:
    """Make the application.

    Args:
        scorer: the model.
        limits: on requests; None: the defaults.
        api_key: that clients must send; empty: none.

    Returns:
        An ASGI application.
    """
    limits = limits or Limits()
    bodies = BodyReader(limits, most_held=MOST_REQUESTS)

    async def pooling(content: dict[str, Any]) -> dict[str, Any]:
        score, tokens = await _score(scorer, content, limits)
        return _answer("pool", scorer.name, {"index": 0, "object": "pooling", "data": [score]}, tokens)

    async def classify(content: dict[str, Any]) -> dict[str, Any]:
        score, tokens = await _score(scorer, content, limits)
        item = {"index": 0, "label": "LABEL_0", "probs": [score], "num_classes": 1}
        return _answer("classify", scorer.name, item, tokens)

    async def health(_: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "model": scorer.name})

    return Starlette(
        routes=[
            Route("/pooling", json_endpoint(pooling, bodies=bodies, api_key=api_key), methods=["POST"]),
            Route("/classify", json_endpoint(classify, bodies=bodies, api_key=api_key), methods=["POST"]),
            Route("/health", health, methods=["GET"]),
        ]
    )


async def _score(scorer: ConversationScorer, content: dict[str, Any], limits: Limits) -> tuple[float, int]:
    if content.get("use_activation"):
        raise BadRequest("use_activation=true: this server gives raw scores only; send false")
    if content.get("model") not in (None, scorer.name):
        raise BadRequest(f"model={content['model']!r} is not here; this server has {scorer.name!r}", 404)
    # Decoding images takes a while too: neither may hold up the event loop, which answers /health.
    turns = await run_in_threadpool(read_messages, content, limits)
    return await run_in_threadpool(scorer.score, turns)


def _answer(prefix: str, model: str, item: dict[str, Any], tokens: int) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [item],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }
