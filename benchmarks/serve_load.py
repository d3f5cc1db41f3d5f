"""Throughput of a chat server under many clients, with the figure of one client measured in the same run beside it.

    python -m megatron_r1v2 serve runs/digits/grpo --port 8000 &
    python -m benchmarks.serve_load --clients 64 --max-tokens 32 --image-pixels 32 \\
        --question "What is left plus right?" --device "2 cores" --output benchmarks/results/serve_load_cpu.json

Only servers on this machine are asked, for a bounded number of requests and a bounded time. Rounds with one client and
with many alternate, so that a machine that gets slower or faster meanwhile moves both.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import ipaddress
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy
from PIL import Image

from megatron_r1v2.resilience.files import write_file

MAX_CLIENTS = 256
MAX_SECONDS = 600.0
_ELSEWHERE = b'{"type": "image_url", "image_url": {"url": "http://127.0.0.1/picture.png"}}'
BAD = (
    b"{",
    b'{"messages": [], "n": "many"}',
    b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1000000000}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": [%s]}]}' % _ELSEWHERE,
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "\\ud800": 1}',
    b"\xff" * 100_000,
)


@dataclass
class Tally:
    """The counts of one round."""

    seconds: float = 0.0
    tokens: int = 0
    answered: int = 0
    refused: int = 0
    """Answered with 503 and asked again."""
    bad_answered_so: int = 0
    """Bad requests that got their 4xx."""
    lost: int = 0
    """Requests without an answer, or with a wrong one."""
    first_token_seconds: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Return the figures of the round as they are written."""
        first = sorted(self.first_token_seconds)
        return {
            "seconds": round(self.seconds, 3),
            "answered": self.answered,
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / self.seconds, 2),
            "requests_per_second": round(self.answered / self.seconds, 3),
            "first_token_seconds_median": round(statistics.median(first), 4) if first else None,
            "first_token_seconds_p95": round(first[int(0.95 * (len(first) - 1))], 4) if first else None,
            "told_503_and_asked_again": self.refused,
            "bad_requests_told_so": self.bad_answered_so,
            "lost": self.lost,
        }


class Load:
    """Clients that ask until a round's requests are used up, each its questions one after the other."""

    def __init__(self, arguments: argparse.Namespace, model: str) -> None:
        """Keep the questions; nothing is asked yet.

        Args:
            arguments: of the command line.
            model: name of the served model.
        """
        self._arguments = arguments
        self._model = model
        self._headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
        self._deadline = time.monotonic() + arguments.seconds

    async def round(self, clients: int, requests: int) -> Tally:
        """Ask `requests` questions by `clients` clients at once."""
        tally = Tally()
        waiting = iter(range(requests))
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(
            base_url=self._arguments.url, headers=self._headers, timeout=self._arguments.seconds, limits=limits
        ) as http:
            started = time.monotonic()
            await asyncio.gather(*(self._client(http, waiting, tally) for _ in range(clients)))
            tally.seconds = time.monotonic() - started
        return tally

    async def _client(self, http: httpx.AsyncClient, waiting: Any, tally: Tally) -> None:
        for number in waiting:
            bad_every = self._arguments.bad_every
            is_bad = bad_every and number % bad_every == bad_every - 1
            bad = BAD[number // max(bad_every, 1) % len(BAD)]
            try:
                await (self._ask_badly(http, tally, bad) if is_bad else self._ask(http, number, tally))
            except httpx.HTTPError:
                tally.lost += 1
            if time.monotonic() > self._deadline:
                return

    async def _ask_badly(self, http: httpx.AsyncClient, tally: Tally, content: bytes) -> None:
        answer = await http.post("/v1/chat/completions", content=content)
        if 400 <= answer.status_code < 500:
            tally.bad_answered_so += 1
        else:
            tally.lost += 1

    async def _ask(self, http: httpx.AsyncClient, number: int, tally: Tally) -> None:
        body = self._question(number)
        while time.monotonic() < self._deadline:
            started = time.monotonic()
            async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code == 200:
                    await self._read(answer, started, tally)
                    return
                if answer.status_code != 503:
                    break
                tally.refused += 1
            await asyncio.sleep(float(answer.headers.get("Retry-After", "1")))
        tally.lost += 1

    async def _read(self, answer: httpx.Response, started: float, tally: Tally) -> None:
        first, tokens = None, 0
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if any(choice["delta"].get("content") for choice in chunk.get("choices", ())):
                first = first or time.monotonic()
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
        if not tokens:
            tally.lost += 1
            return
        tally.answered += 1
        tally.tokens += tokens
        tally.first_token_seconds.append((first or time.monotonic()) - started)

    def _question(self, number: int) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": self._arguments.question}]
        if self._arguments.image_pixels:
            content.insert(
                0, {"type": "image_url", "image_url": {"url": _picture(number, self._arguments.image_pixels)}}
            )
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._arguments.max_tokens,
            "temperature": 1.0,
            "seed": number,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def _picture(seed: int, pixels: int) -> str:
    noise = numpy.random.default_rng(seed).integers(0, 256, (pixels, pixels, 3), dtype=numpy.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the rounds and return the figures."""
    load_before = os.getloadavg()[0]
    listed = httpx.get(
        f"{arguments.url}/v1/models", headers={"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
    )
    listed.raise_for_status()
    load = Load(arguments, listed.json()["data"][0]["id"])
    # The first request of a server pays for what is made once.
    asyncio.run(load.round(1, 1))
    ones, manies = [], []
    for _ in range(arguments.rounds):
        ones.append(asyncio.run(load.round(1, arguments.requests_of_one)))
        manies.append(asyncio.run(load.round(arguments.clients, arguments.requests)))
    ratios = [
        (many.tokens / many.seconds) / (one.tokens / one.seconds)
        for one, many in zip(ones, manies, strict=True)
        if one.tokens
    ]
    return {
        "clients": arguments.clients,
        "max_tokens": arguments.max_tokens,
        "image_pixels": arguments.image_pixels,
        "bad_every": arguments.bad_every,
        "device": arguments.device,
        "cores": os.cpu_count(),
        "load_average_before": round(load_before, 2),
        "load_average_after": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "one_client": [tally.figures() for tally in ones],
        "many_clients": [tally.figures() for tally in manies],
        "throughput_ratio_by_round": [round(ratio, 2) for ratio in ratios],
        "throughput_ratio_median": round(statistics.median(ratios), 2) if ratios else None,
        "lost": sum(tally.lost for tally in ones + manies),
        "healthy_after": httpx.get(f"{arguments.url}/health").status_code == 200,
        "answered_500": _server_errors(arguments.url),
    }


def main() -> None:
    """Measure, print and write the figures; exit 1 when a request was lost or the server is not well."""
    arguments = parser().parse_args()
    host = urlsplit(arguments.url).hostname or ""
    if host != "localhost" and not _is_loopback(host):
        raise SystemExit(f"error: --url {arguments.url}: only servers on this machine are put under load")
    figures = measure(arguments)
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.output:
        write_file(arguments.output, text + "\n")
    sys.exit(1 if figures["lost"] or figures["answered_500"] or not figures["healthy_after"] else 0)


def _server_errors(url: str) -> int:
    """Return how often the server answered with a fault of its own, by its own count."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith('r1v2_requests_total{status="500"}'))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--url", default="http://127.0.0.1:8000", help="of the server, without /v1")
    options.add_argument("--clients", type=int, choices=range(1, MAX_CLIENTS + 1), metavar="1..256", default=64)
    options.add_argument("--requests", type=int, default=192, help="of all clients together, in each round")
    options.add_argument("--requests-of-one", type=int, default=8, help="of the one client, in each round")
    options.add_argument("--rounds", type=int, default=3, help="of one client and of many, in turn")
    options.add_argument("--question", default="What is on the picture?", help="asked about every picture")
    options.add_argument("--device", default="", help="what the server runs on, for the record")
    options.add_argument("--max-tokens", type=int, default=64, help="of a response")
    options.add_argument("--image-pixels", type=int, default=64, help="side of the picture; 0: no picture")
    options.add_argument("--bad-every", type=int, default=8, help="every so-manieth request is bad; 0: none is")
    options.add_argument("--seconds", type=float, default=MAX_SECONDS, help="the whole run takes no longer (about)")
    options.add_argument("--output", default="", help="JSON file for the figures")
    return options


if __name__ == "__main__":
    main()
