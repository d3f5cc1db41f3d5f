"""What /metrics tells a Prometheus server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


class ServerMetrics:
    """Counters of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        """Start at zero."""
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "r1v2_requests",
            "Chat completion requests by the HTTP status they ended with",
            ["status"],
            registry=self._registry,
        )
        self.prompt_tokens = Counter("r1v2_prompt_tokens", "Tokens of accepted prompts", registry=self._registry)
        self.generated_tokens = Counter("r1v2_generated_tokens", "Tokens generated", registry=self._registry)
        self.abandoned = Counter(
            "r1v2_abandoned_requests",
            "Requests that ended before their responses: the client left, or time ran out",
            registry=self._registry,
        )
        self.open_responses = Gauge(
            "r1v2_open_responses", "Responses under way or waiting for the engine", registry=self._registry
        )
        self.first_token_seconds = Histogram(
            "r1v2_first_token_seconds", "From a request to its first token", buckets=_SECONDS, registry=self._registry
        )
        self.request_seconds = Histogram(
            "r1v2_request_seconds", "From a request to its last token", buckets=_SECONDS, registry=self._registry
        )

    def text(self) -> bytes:
        """Return all of them in Prometheus' text format."""
        return generate_latest(self._registry)
